"""Puzzles of `tinsmith eval --tasks arc_agi`, and the picture of its results."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tinsmith.config import RunConfig
from tinsmith.core.errors import UserError
from tinsmith.core.files import atomic_write
from tinsmith.core.rng import derive_seed
from tinsmith.data.arc.generators import TRAIN_RULES, generate_puzzles, held_out_compositions
from tinsmith.data.arc.grids import Puzzle
from tinsmith.data.files import Reject
from tinsmith.data.sources import ArcData
from tinsmith.data.sources.arc import open_tasks, read_tasks
from tinsmith.evals.arc import ArcOutcome
from tinsmith.evals.bpb import report_rejects
from tinsmith.train.plots.arc import draw_puzzles
from tinsmith.train.plots.style import render_figures

MAX_TASKS = 100
"""Default number of generated puzzles per group."""


def open_puzzles(
    model: str,
    config: RunConfig | None,
    data: Path | None,
    solutions: Path | None,
    limit: int | None,
    say: Callable[[str], None],
) -> dict[str, list[Puzzle]]:
    """Return puzzles by group: those of `data`, or, for a run on generated puzzles, new puzzles of
    its training rules and of held-out rules.

    Raise UserError if there are none.
    """
    if data is not None:
        return {data.name.split(".")[0]: _read(data, solutions, limit, say)}
    if solutions is not None:
        raise UserError("--solutions: needs --data")
    sections = () if config is None else config.data
    mine = [each for each in sections if isinstance(each, ArcData) and each.path is None]
    if not mine:
        raise UserError(f"{model}: is not a run on generated puzzles; name ARC tasks with --data")
    section, count = mine[0], limit or MAX_TASKS
    rules = section.rules or TRAIN_RULES
    seed = derive_seed(section.seed, "examination")
    groups = {"seen": rules, "held back": held_out_compositions(rules)}
    return {
        name: list(generate_puzzles(each, seed, count, section.sizes))
        for name, each in groups.items()
        if each
    }


def _read(
    data: Path, solutions: Path | None, limit: int | None, say: Callable[[str], None]
) -> list[Puzzle]:
    answers = None if solutions is None else str(solutions)
    found = list(read_tasks(*open_tasks(str(data), answers, ("--data", "--solutions"))))
    rejects = [each for each in found if isinstance(each, Reject)]
    tasks = [each for each in found if not isinstance(each, Reject)][:limit]
    report_rejects(str(data), "task", len(tasks), rejects, say)
    return [puzzle for task in tasks for puzzle in task.puzzles]


def run_folder_of(path: Path) -> Path:
    """Return the folder of the run that `path` belongs to, else `path`."""
    above = (path, path.parent, path.parent.parent)
    return next((each for each in above if (each / "checkpoints").is_dir()), path)


def picture_folder(model: str) -> Path:
    """Return the run's folder, or the model's folder, or the current folder."""
    run = run_folder_of(Path(model))
    return run if run.is_dir() else Path()


def save_puzzles(folder: Path, outcomes: Sequence[ArcOutcome]) -> Path:
    """Draw some outcomes into `folder` and return the path. Raise UserError if it cannot be
    written.
    """
    path = folder / "arc_agi.png"
    try:
        atomic_write(path, render_figures(lambda: draw_puzzles(outcomes), ["png"])["png"])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return path

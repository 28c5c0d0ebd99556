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
    sources = () if config is None else config.data
    generated = [
        source for source in sources if isinstance(source, ArcData) and source.path is None
    ]
    if not generated:
        raise UserError(f"{model}: is not a run on generated puzzles; name ARC tasks with --data")
    source, count = generated[0], limit or MAX_TASKS
    train_rules = source.rules or TRAIN_RULES
    seed = derive_seed(source.seed, "examination")
    groups = {"seen": train_rules, "held back": held_out_compositions(train_rules)}
    return {
        name: list(generate_puzzles(rules, seed, count, source.sizes))
        for name, rules in groups.items()
        if rules
    }


def _read(
    data: Path, solutions: Path | None, limit: int | None, say: Callable[[str], None]
) -> list[Puzzle]:
    solutions_path = None if solutions is None else str(solutions)
    paths_and_solutions = open_tasks(str(data), solutions_path, ("--data", "--solutions"))
    items = list(read_tasks(*paths_and_solutions))
    rejects = [item for item in items if isinstance(item, Reject)]
    tasks = [item for item in items if not isinstance(item, Reject)][:limit]
    report_rejects(str(data), "task", len(tasks), rejects, say)
    return [puzzle for task in tasks for puzzle in task.puzzles]


def run_folder_of(path: Path) -> Path:
    """Return the folder of the run that `path` belongs to, or `path` if it belongs to none."""
    candidates = (path, path.parent, path.parent.parent)
    return next((folder for folder in candidates if (folder / "checkpoints").is_dir()), path)


def picture_folder(model: str) -> Path:
    """Return the folder to draw into: the run's, or else the model's, or else the current one."""
    run = run_folder_of(Path(model))
    return run if run.is_dir() else Path()


def save_puzzles(folder: Path, outcomes: Sequence[ArcOutcome]) -> Path:
    """Draw some outcomes into arc_agi.png in `folder` and return its path. Raise UserError if it
    cannot be written.
    """
    path = folder / "arc_agi.png"
    try:
        atomic_write(path, render_figures(lambda: draw_puzzles(outcomes), ["png"])["png"])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return path

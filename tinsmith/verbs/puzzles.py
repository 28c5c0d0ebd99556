"""What `tinsmith eval --tasks arc_agi` asks, and where its picture goes."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tinsmith.config import RunConfig
from tinsmith.core.errors import UserError
from tinsmith.core.files import atomic_write
from tinsmith.core.rng import derive_seed
from tinsmith.data.arc.generators import TRAIN_RULES, generate_puzzles, held_out_compositions
from tinsmith.data.arc.grids import Puzzle
from tinsmith.data.config import ArcData
from tinsmith.data.files import Reject
from tinsmith.data.sources.arc import open_tasks, read_tasks
from tinsmith.evals.arc import ArcOutcome
from tinsmith.evals.bpb import report_rejects
from tinsmith.train.plots.arc import draw_puzzles
from tinsmith.train.plots.style import render_figures

MAX_TASKS = 100
"""Generated of each group where nobody says otherwise."""


def open_puzzles(
    model: str,
    config: RunConfig | None,
    data: Path | None,
    solutions: Path | None,
    limit: int | None,
    say: Callable[[str], None],
) -> dict[str, list[Puzzle]]:
    """Puzzles by name of their group: those of `data`; else, for a run on generated ones, new
    puzzles of the rules that it has seen, and of those that are held back.

    UserError where there are none.
    """
    if data is not None:
        return {data.name.split(".")[0]: _read(data, solutions, limit, say)}
    if solutions is not None:
        raise UserError("--solutions: are those of --data, which is not given")
    sections = () if config is None else config.data
    mine = [each for each in sections if isinstance(each, ArcData) and each.path is None]
    if not mine:
        raise UserError(f"{model}: is no run on generated puzzles; say with --data what to solve")
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
    """The folder of the run that `path` is, or whose `final` or checkpoint it is; else `path`."""
    above = (path, path.parent, path.parent.parent)
    return next((each for each in above if (each / "checkpoints").is_dir()), path)


def picture_folder(model: str) -> Path:
    """The run's folder, or the model's where it is no run; else this one."""
    run = run_folder_of(Path(model))
    return run if run.is_dir() else Path()


def save_puzzles(folder: Path, outcomes: Sequence[ArcOutcome]) -> Path:
    """A picture of some outcomes in `folder`; its path. UserError where it cannot be written."""
    path = folder / "arc_agi.png"
    try:
        atomic_write(path, render_figures(lambda: draw_puzzles(outcomes), ["png"])["png"])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return path

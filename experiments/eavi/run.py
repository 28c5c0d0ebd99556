"""Does EAVI beat teacher forcing, at equal tokens and at equal time, on rules that were held back?

    python -m experiments.eavi.run [--seeds 3] [--only minutes dense] [--steps 60]

Every model of cases.py is taught generated puzzles by teacher forcing (stage one), and goes on from
there (stage two) by EAVI with soft and with hard excursions, and by teacher forcing: for as many
tasks, and on for as long as the soft excursions took. All are examined on new tasks of the rules
they were taught, and of rules that are held back. One thread, three seeds by default.

Results go to results.json as they come, and a case that is there is not run again, so an
interrupted run goes on. At the end page.py draws README.md and its pictures. With another number
of steps, stage one is as much shorter or longer, and results and page go to a folder of their own.
"""

import statistics
from pathlib import Path
from typing import Any

import torch

from experiments.common import Results, parser, place, workplace
from experiments.eavi import cases, page
from experiments.eavi.exam import Exam
from tinsmith.config import from_dict
from tinsmith.core.log import read_metrics
from tinsmith.train.trainer import train
from tinsmith.verbs.puzzles import save_puzzles

Row = dict[str, Any]


class School:
    """Runs in a folder, each of them once."""

    def __init__(self, folder: Path, out: Path, steps: int):
        self._exam, self._out, self._steps = Exam(folder / "exam"), out, steps

    def rows(self, model: str, seed: int) -> list[Row]:
        """All that is measured of one model and seed."""
        name, steps = f"{model}-{seed}", self._steps
        first = max(1, cases.START * steps // cases.STEPS)
        begun = train(from_dict(cases.start(model, seed, first)), name)
        each = _seconds(begun) / first
        rows = [self._row(begun, model, seed, "start", first, each * first)]
        for way in ("soft", "hard"):
            run = self._second(way, begun, name, seed, steps)
            rows.append(self._row(run, model, seed, way, steps, _seconds(run)))
        longer = max(steps, round(rows[1]["seconds"] / each))
        run = self._second("teacher", begun, name, seed, longer)
        equal = run / "checkpoints" / f"step-{steps:08d}"
        rows.append(self._row(equal, model, seed, "teacher", steps, _seconds(run, steps)))
        rows.append(self._row(run, model, seed, "teacher, longer", longer, _seconds(run)))
        return rows

    def _second(self, way: str, begun: Path, name: str, seed: int, steps: int) -> Path:
        recipe = cases.second(way, str(begun), seed, steps, save_every=self._steps)
        return train(from_dict(recipe), f"{name}-{way}")

    def _row(self, run: Path, model: str, seed: int, way: str, steps: int, seconds: float) -> Row:
        marks, output = self._exam.marks(run)
        if (model, seed, way) == ("minutes", 0, "soft"):
            save_puzzles(self._out, output)
        facts = {"model": model, "seed": seed, "way": way, "steps": steps}
        return facts | {"tasks": steps * cases.ROWS, "seconds": round(seconds, 3)} | marks


def _seconds(run: Path, steps: int | None = None) -> float:
    """Spent on the first `steps` steps, or on all: a step's median, so that neither saves nor other
    work on the machine count.
    """
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]
    speed = statistics.median(line["tokens_per_second"] for line in lines)
    return len(lines[:steps]) * cases.ROWS * cases.CONTEXT / speed


def main() -> None:
    words = parser(__doc__, list(cases.MODELS))
    words.add_argument("--steps", type=int, default=cases.STEPS, help="steps of stage two")
    requested = words.parse_args()
    torch.set_num_threads(1)
    out = place(__file__, requested.steps, cases.STEPS)
    results = Results(out, "seed", "model")
    with workplace() as folder:
        school = School(folder, out, requested.steps)
        for seed, model in results.missing(range(requested.seeds), requested.only):
            results.add(*school.rows(model, seed))
    page.write(results.rows, out)


if __name__ == "__main__":
    main()

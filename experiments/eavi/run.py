"""Compares EAVI with teacher forcing on held-out rules, at equal tokens and at equal time.

    python -m experiments.eavi.run [--seeds 3] [--only minutes dense] [--steps 60]

Every model of cases.py trains on generated puzzles by teacher forcing (stage one). Stage two
continues by EAVI with soft and with hard excursions, by teacher forcing for as many tasks, and by
teacher forcing for the time that the soft excursions took. All runs are evaluated on new tasks of
the training rules and on tasks of held-out rules. One thread, three seeds by default.

Results are written to results.json after each model and seed, and those in that file are not run
again, so an interrupted experiment can be continued. At the end page.py writes README.md and its
pictures. With another number of steps, stage one changes in proportion, and results and page go to
the folder `steps-N`.
"""

import statistics
from pathlib import Path
from typing import Any

import torch

from experiments.common import Results, parser, results_folder, temporary_runs
from experiments.eavi import cases, page
from experiments.eavi.evaluation import Evaluation
from tinsmith.config import from_dict
from tinsmith.core.log import read_metrics
from tinsmith.train.trainer import train
from tinsmith.verbs.puzzles import save_puzzles

Record = dict[str, Any]


class Experiment:
    """Trains and evaluates both stages of a model and seed."""

    def __init__(self, folder: Path, out: Path, steps: int):
        self._evaluation = Evaluation(folder / "eval")
        self._out, self._steps = out, steps

    def measure(self, model: str, seed: int) -> list[Record]:
        """Train all runs of a model and seed and return their records."""
        name, steps = f"{model}-{seed}", self._steps
        first_steps = max(1, cases.START * steps // cases.STEPS)
        first_run = train(from_dict(cases.start(model, seed, first_steps)), name)
        step_seconds = _seconds(first_run) / first_steps
        records = [
            self._record(first_run, model, seed, "start", first_steps, step_seconds * first_steps)
        ]
        for way in ("soft", "hard"):
            run = self._second(way, first_run, name, seed, steps)
            records.append(self._record(run, model, seed, way, steps, _seconds(run)))
        longer_steps = max(steps, round(records[1]["seconds"] / step_seconds))
        run = self._second("teacher", first_run, name, seed, longer_steps)
        equal = run / "checkpoints" / f"step-{steps:08d}"
        records.append(self._record(equal, model, seed, "teacher", steps, _seconds(run, steps)))
        records.append(
            self._record(run, model, seed, "teacher, longer", longer_steps, _seconds(run))
        )
        return records

    def _second(self, way: str, first: Path, name: str, seed: int, steps: int) -> Path:
        recipe = cases.second(way, str(first), seed, steps, save_every=self._steps)
        return train(from_dict(recipe), f"{name}-{way}")

    def _record(
        self, run: Path, model: str, seed: int, way: str, steps: int, seconds: float
    ) -> Record:
        scores, outcomes = self._evaluation.evaluate(run)
        if (model, seed, way) == ("minutes", 0, "soft"):
            save_puzzles(self._out, outcomes)
        facts = {"model": model, "seed": seed, "way": way, "steps": steps}
        return facts | {"tasks": steps * cases.BATCH_SIZE, "seconds": round(seconds, 3)} | scores


def _seconds(run: Path, steps: int | None = None) -> float:
    """Return the seconds of the first `steps` steps, or of all, from the median of a step, so that
    neither saves nor short loads of the machine count.
    """
    records = [
        record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"
    ]
    speed = statistics.median(record["tokens_per_second"] for record in records)
    return len(records[:steps]) * cases.BATCH_SIZE * cases.SEQ_LEN / speed


def main() -> None:
    options = parser(__doc__, list(cases.MODELS))
    options.add_argument("--steps", type=int, default=cases.STEPS, help="steps of stage two")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    out = results_folder(__file__, arguments.steps, cases.STEPS)
    results = Results(out, "seed", "model")
    with temporary_runs() as folder:
        experiment = Experiment(folder, out, arguments.steps)
        for seed, model in results.missing(range(arguments.seeds), arguments.only):
            results.add(*experiment.measure(model, seed))
    page.write(results.records, out)


if __name__ == "__main__":
    main()

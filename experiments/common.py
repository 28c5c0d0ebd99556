"""Command line, results file and recipes that the experiments share."""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

Record = dict[str, Any]

SEQ_LEN, BATCH_SIZE = 256, 8
"""Of runs on the embedded corpus."""


def parser(description: str | None, only: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser with the options that all experiments have."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--seeds", type=int, default=3)
    result.add_argument("--only", nargs="+", default=list(only), choices=only)
    return result


def results_folder(experiment: str, steps: int, default_steps: int) -> Path:
    """Return the folder of the experiment's file, or `steps-N` in it if the number of steps is not
    the default.
    """
    folder = Path(experiment).parent
    return folder if steps == default_steps else folder / f"steps-{steps}"


class Results:
    """Records in `results.json` of a folder. Each is written when it is measured, and a case with a
    record is not measured again, so that an interrupted experiment can be continued.
    """

    def __init__(self, folder: Path, *keys: str):
        """`keys` are the fields that identify a case."""
        folder.mkdir(exist_ok=True)
        self.path, self.keys = folder / "results.json", keys
        self.records: list[Record] = []
        if self.path.exists():
            self.records = json.loads(self.path.read_text(encoding="utf-8"))

    def missing(self, *choices: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """Yield the key values of cases without a record; the first key varies slowest."""
        known = {tuple(record[key] for key in self.keys) for record in self.records}
        return (each for each in product(*choices) if each not in known)

    def add(self, *records: Record) -> None:
        """Write more records to the file, and print their fields except lists."""
        self.records += records
        self.path.write_text(json.dumps(self.records, indent=1) + "\n", encoding="utf-8")
        for record in records:
            scalars = {key: value for key, value in record.items() if not isinstance(value, list)}
            print(json.dumps(scalars), flush=True)


@contextmanager
def temporary_runs() -> Iterator[Path]:
    """Yield a temporary folder, and let `TINSMITH_RUNS` be `runs/` in it."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TINSMITH_RUNS"] = str(Path(folder) / "runs")
        yield Path(folder)


def stdlib_recipe(sections: Record, seed: int, steps: int, every: int) -> Record:
    """Return a recipe on the embedded corpus, evaluated at its end and logged `every` steps."""
    train = {
        "seq_len": SEQ_LEN,
        "batch_size": BATCH_SIZE,
        "steps": steps,
        "seed": seed,
        "precision": "fp32",
    }
    intervals = {"save_every": steps, "eval_every": steps, "sample_every": steps}
    return sections | {
        "data": {"kind": "stdlib"},
        "optim": {"schedule": {"kind": "wsd", "warmup": 20, "decay": 0.4}},
        "train": train | intervals | {"keep": {"last": 1, "best": False}},
        "eval": {"max_samples": 128, "max_new_tokens": 8},
        "log": {"every": min(every, steps)},
    }


def last_bpb(metrics: Sequence[Record]) -> float:
    """Return bits per byte of the last evaluation."""
    return [record["bpb"] for record in metrics if record["kind"] == "eval"][-1]


def step_seconds(metrics: Sequence[Record]) -> float:
    """Return the median seconds of a step of `stdlib_recipe`."""
    speeds = [record["tokens_per_second"] for record in metrics if record["kind"] == "train"]
    return SEQ_LEN * BATCH_SIZE / statistics.median(speeds)

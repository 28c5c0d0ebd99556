"""What all experiments have in common: how one is asked for, and rows of results that are kept."""

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

Row = dict[str, Any]

CONTEXT, ROWS = 256, 8
"""Tokens of a row and rows of a step, on the embedded corpus."""


def parser(description: str | None, only: Sequence[str]) -> argparse.ArgumentParser:
    """Words that every experiment understands."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--only", nargs="+", default=list(only), choices=only)
    return made


def place(experiment: str, steps: int, usual: int) -> Path:
    """Where results go: beside the experiment's file; with another number of steps than the usual
    one, to a folder of their own.
    """
    here = Path(experiment).parent
    return here if steps == usual else here / f"steps-{steps}"


class Results:
    """Rows in `results.json` of a folder. They are written as they come, and a case that is there
    is not measured again, so an interrupted experiment goes on.
    """

    def __init__(self, folder: Path, *keys: str):
        """`keys`: what of a row tells cases apart."""
        folder.mkdir(exist_ok=True)
        self.path, self.keys = folder / "results.json", keys
        self.rows: list[Row] = []
        if self.path.exists():
            self.rows = json.loads(self.path.read_text(encoding="utf-8"))

    def missing(self, *choices: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """Combinations of values of the keys that have no row, the first key slowest."""
        known = {tuple(row[key] for key in self.keys) for row in self.rows}
        return (each for each in product(*choices) if each not in known)

    def add(self, *rows: Row) -> None:
        """Keep more rows, and print what is short of them."""
        self.rows += rows
        self.path.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
        for row in rows:
            short = {key: value for key, value in row.items() if not isinstance(value, list)}
            print(json.dumps(short), flush=True)


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder that is gone afterwards, with all runs that are trained meanwhile in it."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TINSMITH_RUNS"] = str(Path(folder) / "runs")
        yield Path(folder)


def on_stdlib(sections: Row, seed: int, steps: int, every: int) -> Row:
    """A recipe on the embedded corpus, looked at once, at its end; `every`: steps between lines."""
    shape = {
        "seq_len": CONTEXT,
        "batch_size": ROWS,
        "steps": steps,
        "seed": seed,
        "precision": "fp32",
    }
    looks = {"save_every": steps, "eval_every": steps, "sample_every": steps}
    return sections | {
        "data": {"kind": "stdlib"},
        "optim": {"schedule": {"kind": "wsd", "warmup": 20, "decay": 0.4}},
        "train": shape | looks | {"keep": {"last": 1, "best": False}},
        "eval": {"max_samples": 128, "max_new_tokens": 8},
        "log": {"every": min(every, steps)},
    }


def bits(lines: Sequence[Row]) -> float:
    """Bits per byte of the last evaluation."""
    return [line["bpb"] for line in lines if line["kind"] == "eval"][-1]


def step_seconds(lines: Sequence[Row]) -> float:
    """Seconds of a step of `on_stdlib`, in the median."""
    speeds = [line["tokens_per_second"] for line in lines if line["kind"] == "train"]
    return CONTEXT * ROWS / statistics.median(speeds)

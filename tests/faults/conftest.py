"""A run small enough to be killed twenty times, and what two runs are compared by."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests import warm
from tests.ranks import ranks_environment

TIMINGS = ("tokens_per_second", "eta_seconds")


@pytest.fixture(scope="session")
def recipe() -> dict:
    """Dropout, a noisy gate with its bias, accumulation, evaluation and samples in between:
    everything that uses randomness or moves outside of the optimizer.
    """
    gqa = {"kind": "gqa", "heads": 4, "kv_heads": 2, "value_residual": True}
    routed = {"kind": "deepseek_moe", "experts": 4, "top_k": 2, "hidden_dim": 16, "noise": 0.1}
    return {
        "model": {
            "vocab_size": 320,
            "dim": 32,
            "depth": 2,
            "max_seq_len": 64,
            "dropout": {"embedding": 0.1, "attention": 0.1, "residual": 0.1},
            "pattern": [
                {"mixer": gqa, "feed_forward": {"kind": "swiglu", "hidden_dim": 48}},
                {"mixer": gqa, "feed_forward": routed},
            ],
        },
        "tokenizer": {"train": {"vocab_size": 320}},
        "data": {"kind": "tasks", "count": 400, "digits": 2, "length": 4},
        "objective": {"kind": "pretrain"},
        "optim": {"schedule": {"kind": "wsd", "warmup": 2}},
        "train": {
            "steps": 10,
            "seq_len": 48,
            "batch_size": 4,
            "grad_accum_steps": 2,
            "precision": "fp32",
            "save_every": 3,
            "eval_every": 4,
            "sample_every": 4,
            "keep": {"last": 2, "best": True},
        },
        "eval": {"max_samples": 4, "max_new_tokens": 6},
        "log": {"every": 2},
    }


class Place:
    """A folder of runs, and the command line in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs = folder / "runs"

    def write(self, name: str, data: dict) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(data), encoding="utf-8")
        return path

    def environment(self, **extra: str) -> dict[str, str]:
        own = {"TINSMITH_RUNS": str(self.runs), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return os.environ | own | extra

    def start(self, *arguments: object, **extra: str) -> warm.Process:
        return warm.Process(arguments, self.environment(**extra), self.folder)

    def start_pair(
        self,
        data: dict,
        name: str,
        kind: str,
        *more: object,
        program: Sequence[object] = (warm.TINSMITH,),
    ) -> list[warm.Process]:
        """Both ranks of a run."""
        path = self.write(name, data | {"parallel": {"kind": kind}})
        arguments = ("train", path, "--name", name, *more)
        return [
            warm.Process(arguments, self.environment(**ours), self.folder, program=program)
            for ours in ranks_environment(2)
        ]

    def train_pair(
        self,
        data: dict,
        name: str,
        kind: str,
        *more: object,
        program: Sequence[object] = (warm.TINSMITH,),
    ) -> tuple[int, str]:
        """The worse exit code, and what both said."""
        pair = self.start_pair(data, name, kind, *more, program=program)
        output = [rank.communicate(timeout=300)[0] for rank in pair]
        return max(abs(rank.returncode or 0) for rank in pair), "".join(output)

    def call(self, *arguments: object, **extra: str) -> tuple[int, str]:
        process = self.start(*arguments, **extra)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def cold(self, *arguments: object) -> tuple[int, str]:
        """In a process that imports everything anew, with a seed of hashes of its own."""
        done = subprocess.run(
            [sys.executable, "-m", "tinsmith", *map(str, arguments)],
            env=self.environment(),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout

    def train(self, data: dict, name: str, *more: object, **extra: str) -> tuple[int, str]:
        return self.call("train", self.write(name, data), "--name", name, *more, **extra)

    def whole(self, data: dict, name: str) -> tuple[dict[str, object], list[str]]:
        """What a run leaves that nothing happens to, and its events in order. Its shards are there
        before it begins, so that every later run passes the same events.
        """
        code, output = self.call("prepare", self.write(name, data))
        assert code == 0, output
        events = self.folder / f"{name}.events"
        code, output = self.train(data, name, TINSMITH_COUNT_EVENTS=str(events))
        assert code == 0, output
        return self.result(name), events.read_text(encoding="utf-8").splitlines()

    @staticmethod
    def points(events: Sequence[str], name: str) -> list[int]:
        """Where events of that name stand, counted from 1."""
        return [place for place, event in enumerate(events, 1) if event == name]

    def killed(self, data: dict, name: str, event: int) -> dict[str, object]:
        """What a run leaves that is killed at that event, counted from 1, and resumed."""
        code, output = self.train(data, name, TINSMITH_KILL_AT=str(event))
        assert code == -signal.SIGKILL, output
        code, output = self.train(data, name, "--resume")
        assert code == 0, output
        return self.result(name)

    def result(self, name: str) -> dict[str, object]:
        """Hashes of what a finished run left, and its metrics without timings."""
        run = self.runs / name
        newest = sorted((run / "checkpoints").glob("step-*"))[-1]
        files = [newest / f"{part}.safetensors" for part in ("model", "optim", "rng-00000")]
        hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        final = run / "final" / "model.safetensors"
        return hashes | {
            "final": hashlib.sha256(final.read_bytes()).hexdigest(),
            "metrics": self.metrics(name),
            "checkpoints": sorted(path.name for path in (run / "checkpoints").glob("step-*")),
        }

    def metrics(self, name: str) -> list[dict]:
        lines = (self.runs / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


@pytest.fixture(scope="session")
def steady_model(recipe) -> dict:
    """The recipe's model without dropout and noise, which depend on how a batch is split; without
    experts, among which the last bits of a sum of another order may turn a choice.
    """
    return {**recipe["model"], "dropout": {}, "pattern": recipe["model"]["pattern"][:1]}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="session")
def shared_place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def reference(shared_place: Place, recipe: dict) -> dict[str, object]:
    """The run that nothing happened to, its events in order, and what it left."""
    twin = Place(shared_place.folder)
    twin.runs = shared_place.folder / "twin"
    code, output = twin.cold("train", twin.write("whole", recipe), "--name", "whole")
    assert code == 0, output
    left, events = shared_place.whole(recipe, "whole")
    return left | {"twin": twin.result("whole"), "events": events}

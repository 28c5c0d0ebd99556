"""A run small enough to be killed twenty times, and the comparison of two runs' results."""

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
    """A recipe with everything that draws random numbers or changes outside of the optimizer:
    dropout, router noise and bias, gradient accumulation, evaluation, samples.
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


class Workspace:
    """A folder with `runs/` in which `tinsmith` commands run as processes."""

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
        """Start both ranks of a run."""
        path = self.write(name, data | {"parallel": {"kind": kind}})
        arguments = ("train", path, "--name", name, *more)
        return [
            warm.Process(arguments, self.environment(**rank), self.folder, program=program)
            for rank in ranks_environment(2)
        ]

    def train_pair(
        self,
        data: dict,
        name: str,
        kind: str,
        *more: object,
        program: Sequence[object] = (warm.TINSMITH,),
    ) -> tuple[int, str]:
        """Train on two ranks; return the larger exit code and the output of both."""
        pair = self.start_pair(data, name, kind, *more, program=program)
        output = [rank.communicate(timeout=300)[0] for rank in pair]
        return max(abs(rank.returncode or 0) for rank in pair), "".join(output)

    def call(self, *arguments: object, **extra: str) -> tuple[int, str]:
        process = self.start(*arguments, **extra)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def cold(self, *arguments: object) -> tuple[int, str]:
        """Run a command in a new interpreter, with its own imports and hash seed."""
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
        """Run without interruption; return its result and the names of its kill points in order.
        The data are prepared first, so that every later run passes the same points.
        """
        code, output = self.call("prepare", self.write(name, data))
        assert code == 0, output
        events = self.folder / f"{name}.events"
        code, output = self.train(data, name, TINSMITH_COUNT_EVENTS=str(events))
        assert code == 0, output
        return self.result(name), events.read_text(encoding="utf-8").splitlines()

    @staticmethod
    def points(events: Sequence[str], name: str) -> list[int]:
        """Return the indices, from 1, of events of that name."""
        return [index for index, event in enumerate(events, 1) if event == name]

    def killed(self, data: dict, name: str, event: int) -> dict[str, object]:
        """Kill a run at the event of that index, from 1, resume it, and return its result."""
        code, output = self.train(data, name, TINSMITH_KILL_AT=str(event))
        assert code == -signal.SIGKILL, output
        code, output = self.train(data, name, "--resume")
        assert code == 0, output
        return self.result(name)

    def result(self, name: str) -> dict[str, object]:
        """Return hashes of the files of a finished run, and its metrics without timings."""
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
        records = [json.loads(line) for line in lines]
        return [{k: v for k, v in record.items() if k not in TIMINGS} for record in records]


@pytest.fixture(scope="session")
def deterministic_model(recipe) -> dict:
    """The recipe's model without dropout and noise, whose draws depend on how a batch is split, and
    without experts, whose selection may change with the rounding of another summation order.
    """
    return {**recipe["model"], "dropout": {}, "pattern": recipe["model"]["pattern"][:1]}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


@pytest.fixture(scope="session")
def shared_workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def reference(shared_workspace: Workspace, recipe: dict) -> dict[str, object]:
    """Results of an uninterrupted run, of a second one in a new interpreter, and kill points."""
    twin = Workspace(shared_workspace.folder)
    twin.runs = shared_workspace.folder / "twin"
    code, output = twin.cold("train", twin.write("whole", recipe), "--name", "whole")
    assert code == 0, output
    result, events = shared_workspace.whole(recipe, "whole")
    return result | {"twin": twin.result("whole"), "events": events}

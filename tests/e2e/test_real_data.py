"""Tiny recipes of alignment take real pairs and questions, as rows come, where they are present."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tinsmith.config import load
from tinsmith.core.log import Metrics, read_metrics
from tinsmith.train.trainer import train

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "tiny"
SHORT = [
    "batch_size=2",
    "steps=2",
    "eval_every=2",
    "save_every=2",
    "sample_every=100",
    "seq_len=512",
]

Run = Callable[..., list[Metrics]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_data: Path) -> Run:
    """Two steps of a recipe on some rows of a data set: its metrics."""
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path))
    monkeypatch.setenv("TINSMITH_DATA", str(real_data))

    def short(name: str, data: str, *overrides: str) -> list[Metrics]:
        source = f"data={{kind: chats, path: $TINSMITH_DATA/{data}, limit: 60}}"
        reported = [
            source,
            *(f"train.{each}" for each in SHORT),
            "log.every=1",
            "eval.max_samples=4",
        ]
        found = train(load(RECIPES / f"{name}.yaml", [*reported, *overrides]), name)
        return read_metrics(found / "metrics.jsonl")

    return short


@pytest.fixture
def start(run: Run, tmp_path: Path) -> str:
    """A model that has seen questions of svamp."""
    run("sums", "svamp", "model.max_seq_len=512", "train.batch_size=4")
    return f"init_from={tmp_path / 'sums'}"


def losses(lines: list[Metrics], kind: str) -> list[float]:
    return [line["loss"] for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("data", ["rasbt_instruct_pref", "hh_rlhf/helpful_base.train_short.jsonl"])
def test_tiny_dpo_takes_real_pairs_and_begins_at_ln_2(run, start, data):
    lines = run("dpo", data, start)
    first, second = losses(lines, "train")
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert second != first
    assert losses(lines, "eval")


@pytest.mark.parametrize("name", ["grpo", "ppo", "spo"])
def test_tiny_online_recipes_take_real_questions_with_their_answers(run, start, name):
    lines = run(name, "svamp", start)
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["reward_failed_fraction"] for line in steps] == [0, 0]
    assert all(0 <= line["reward"] <= 1 and line["completion_length"] > 0 for line in steps)
    assert losses(lines, "eval")

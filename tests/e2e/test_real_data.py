"""Tiny recipes of DPO, GRPO, PPO and SPO train on real data sets, if these are present."""

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
    """Train a recipe for two steps on 60 samples of a data set and return its metrics."""
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path))
    monkeypatch.setenv("TINSMITH_DATA", str(real_data))

    def train_briefly(name: str, data: str, *overrides: str) -> list[Metrics]:
        source = f"data={{kind: chats, path: $TINSMITH_DATA/{data}, limit: 60}}"
        settings = [
            source,
            *(f"train.{each}" for each in SHORT),
            "log.every=1",
            "eval.max_samples=4",
        ]
        folder = train(load(RECIPES / f"{name}.yaml", [*settings, *overrides]), name)
        return read_metrics(folder / "metrics.jsonl")

    return train_briefly


@pytest.fixture
def start(run: Run, tmp_path: Path) -> str:
    """An override that starts from a model trained on svamp."""
    run("sums", "svamp", "model.max_seq_len=512", "train.batch_size=4")
    return f"init_from={tmp_path / 'sums'}"


def losses(records: list[Metrics], kind: str) -> list[float]:
    return [record["loss"] for record in records if record["kind"] == kind]


@pytest.mark.parametrize("data", ["rasbt_instruct_pref", "hh_rlhf/helpful_base.train_short.jsonl"])
def test_tiny_dpo_trains_on_real_pairs_and_starts_at_ln_2(run, start, data):
    records = run("dpo", data, start)
    first, second = losses(records, "train")
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert second != first
    assert losses(records, "eval")


@pytest.mark.parametrize("name", ["grpo", "ppo", "spo"])
def test_tiny_rl_recipes_train_on_real_questions(run, start, name):
    records = run(name, "svamp", start)
    steps = [record for record in records if record["kind"] == "train"]
    assert [record["reward_failed_fraction"] for record in steps] == [0, 0]
    assert all(0 <= record["reward"] <= 1 and record["completion_length"] > 0 for record in steps)
    assert losses(records, "eval")

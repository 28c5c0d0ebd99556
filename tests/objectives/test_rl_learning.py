"""T11: GRPO, PPO and SPO raise the accuracy of greedy answers to sums that were held back.

The model they begin with was fine-tuned on sums of which 45 in 100 are right and the others one too
high, so it knows its sums and does not know which to say.
"""

import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tinsmith.config import from_dict
from tinsmith.data.loader.loader import open_dataset
from tinsmith.data.prepare.prepare import prepare
from tinsmith.hub.load import load
from tinsmith.train.trainer import train

FORMS = ("{} + {} = ?", "{} plus {}?")
HELD_BACK = 60
MODEL = {
    "vocab_size": 300,
    "dim": 64,
    "depth": 2,
    "max_seq_len": 64,
    "tie_embeddings": True,
    "pattern": [
        {
            "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2},
            "feed_forward": {"kind": "swiglu", "hidden_dim": 160},
        }
    ],
}
KINDS = {
    "grpo": {"kind": "grpo", "num_generations": 8},
    "ppo": {"kind": "ppo", "num_epochs": 2, "num_minibatches": 2},
    "spo": {"kind": "spo"},
}
ROWS = {"grpo": 32, "ppo": 128, "spo": 128}


def adamw(lr: float) -> dict[str, Any]:
    return {"kind": "adamw", "lr": lr, "betas": [0.9, 0.95], "weight_decay": 0.0}


class School:
    """Sums in a folder, and runs of one seed."""

    def __init__(self, folder: Path, seed: int, room: int = 64, steps: int = 200):
        self.folder, self.seed, self.room, self.steps = folder, seed, room, steps
        numbers = random.Random(0)
        every = list(product(FORMS, range(10), range(10)))
        numbers.shuffle(every)
        self.held, seen = every[:HELD_BACK], every[HELD_BACK:]
        self.write("held", self.held, lambda: 0)
        self.write("right", seen, lambda: 0)
        self.write("taught", seen * 10, lambda: int(numbers.random() > 0.45))

    def write(self, name: str, sums: list, wrong: Any) -> None:
        lines = [
            json.dumps({"instruction": form.format(a, b), "output": str(a + b + wrong())})
            for form, a, b in sums
        ]
        (self.folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")

    def data(self, name: str, **more: Any) -> dict[str, Any]:
        return {"kind": "chats", "path": str(self.folder / f"{name}.jsonl")} | more

    def run(self, name: str, recipe: dict[str, Any], **changed: Any) -> Path:
        never = {"save_every": 10_000, "eval_every": 10_000, "sample_every": 10_000}
        section = {"precision": "fp32", "seed": self.seed} | never | recipe["train"] | changed
        return train(from_dict(recipe | {"train": section}), f"{name}-{self.seed}")

    def taught(self) -> Path:
        optim = {"matrices": {"kind": "muon", "lr": 0.02}, "others": adamw(3e-3)}
        return self.run(
            "taught",
            {
                "model": MODEL | {"max_seq_len": self.room, "vocab_size": self.room + 256},
                "tokenizer": {"train": {"vocab_size": self.room + 256}},
                "data": self.data("taught", validation=0.0),
                "objective": {"kind": "sft"},
                "optim": optim | {"schedule": {"kind": "wsd", "warmup": 10, "decay": 0.4}},
                "train": {"steps": self.steps, "seq_len": 2 * self.room, "batch_size": 8},
            },
        )

    def practised(self, kind: str, start: Path, steps: int) -> Path:
        section = {"max_new_tokens": 4, "generation_batch_size": 256, "seed": self.seed} | KINDS[
            kind
        ]
        batches = section.get("num_minibatches", 1)
        rates = {"matrices": adamw(3e-4), "others": adamw(3e-4), "schedule": {"kind": "constant"}}
        return self.run(
            kind,
            {
                "init_from": str(start),
                "data": self.data("right", validation=str(self.folder / "held.jsonl")),
                "objective": section,
                "optim": rates,
                "train": {"steps": steps, "seq_len": self.room, "batch_size": ROWS[kind]}
                | {"grad_accum_steps": batches},
            },
        )

    def accuracy(self, run: Path) -> float:
        """Of greedy answers to all the sums that were held back."""
        lm, tokenizer = load(run / "final")
        assert tokenizer is not None
        section = {"max_new_tokens": 4} | KINDS["grpo"]
        reported = {"init_from": str(run), "data": self.data("held"), "objective": section}
        config, place = from_dict(reported), self.folder / "exam"
        made = prepare(config.data, tokenizer, "prompts", place, print, seq_len=self.room)
        source = open_dataset(made.folder, "prompts", "train", self.room, 0)
        objective = config.objective.build()
        objective.prepare(lm, tokenizer)
        return objective.evaluate(lm, source, HELD_BACK)["reward"]


@pytest.fixture
def school(tmp_path, monkeypatch):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path / "runs"))
    return lambda seed: School(tmp_path, seed)


def test_T11_grpo_raises_accuracy_on_validation_sums(school):
    one = school(0)
    start = one.taught()
    before = one.accuracy(start)
    assert 0.2 <= before <= 0.6
    assert one.accuracy(one.practised("grpo", start, 25)) >= before + 0.2


@pytest.mark.slow
def test_T11_grpo_ppo_and_spo_raise_accuracy_by_20_points_over_three_seeds(school):
    gains: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for seed in (1, 2, 3):
        one = school(seed)
        start = one.taught()
        before = one.accuracy(start)
        assert 0.2 <= before <= 0.6
        for kind in KINDS:
            gains[kind].append(one.accuracy(one.practised(kind, start, 25)) - before)
    for kind, gained in gains.items():
        assert sum(gained) / 3 >= 0.2, (kind, gained)

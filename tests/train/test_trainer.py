"""Whole runs in this process: precisions, kept checkpoints, larger vocabularies, metrics."""

import json
import math
from pathlib import Path

import pytest
import torch

import tinsmith
from tinsmith.config import from_dict
from tinsmith.core.errors import UserError
from tinsmith.core.log import RunLog, read_metrics
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.text.bpe import train_bpe
from tinsmith.train.precision import LossScaler
from tinsmith.train.setup import resize_embeddings
from tinsmith.train.trainer import train

RECIPE = {
    "model": {
        "vocab_size": 320,
        "dim": 32,
        "depth": 2,
        "max_seq_len": 64,
        "pattern": [
            {
                "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2},
                "feed_forward": {"kind": "swiglu", "hidden_dim": 48},
            }
        ],
    },
    "tokenizer": {"train": {"vocab_size": 320}},
    "data": {"kind": "tasks", "count": 300, "digits": 2, "length": 4},
    "objective": {"kind": "pretrain"},
    "optim": {"schedule": {"kind": "wsd", "warmup": 2}},
    "train": {
        **{"steps": 6, "seq_len": 48, "batch_size": 4, "precision": "fp32"},
        **{"save_every": 2, "eval_every": 2, "sample_every": 6},
    },
    "eval": {"max_samples": 4, "max_new_tokens": 4},
    "log": {"every": 1},
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train the recipe with some sections changed and return the run's folder."""
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path / "runs"))

    def train_with(name: str = "run", **sections: dict) -> Path:
        data = dict(RECIPE)
        for section, values in sections.items():
            old = data.get(section, {})
            merge = isinstance(values, dict) and section not in ("data", "objective")
            data[section] = {**old, **values} if merge else values
        return train(from_dict(data), name)

    return train_with


def records(folder: Path, kind: str) -> list[dict]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == kind]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains(precision, run):
    folder = run(train={"precision": precision, "steps": 30, "eval_every": 30, "save_every": 30})
    losses = [record["loss"] for record in records(folder, "train")]
    assert losses[0] == pytest.approx(math.log(320), rel=0.05)
    assert losses[-1] < losses[0] - 0.5
    assert all(math.isfinite(loss) for loss in losses)


def test_fp16_loss_scale_is_logged_and_overflow_is_not_a_nonfinite_step(run, monkeypatch):
    monkeypatch.setattr(LossScaler, "__init__", _huge_scale)
    folder = run(train={"precision": "fp16", "steps": 24})
    train_records = records(folder, "train")
    assert not records(folder, "nonfinite_step")
    assert train_records[-1]["nonfinite_steps"] == 0
    assert train_records[-1]["loss_scale"] < 2.0**34


def _huge_scale(
    self, precision: str, init_scale: float = 2.0**34, growth_interval: int = 2000
) -> None:
    self.enabled, self.scale = True, init_scale
    self.growth_interval, self.steps_since_overflow = growth_interval, 0


def test_loss_scale_halves_on_overflow_and_doubles_after_an_interval():
    scaler = LossScaler("fp16", init_scale=8.0, growth_interval=2)
    scaler.update(True)
    assert scaler.scale == 4.0
    scaler.update(False)
    scaler.update(False)
    assert scaler.scale == 8.0
    off = LossScaler("bf16")
    off.update(True)
    assert off.scale == 1.0


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def test_keep_last_and_best(run):
    folder = run(train={"steps": 10, "keep": {"last": 2, "best": True}})
    best = json.loads((folder / "checkpoints/step-00000010/state.json").read_text())["best"]["step"]
    assert saved_steps(folder) == sorted({8, 10, int(best)})


def test_keep_max_val_loss_keeps_only_checkpoints_below_it_and_the_newest(run):
    folder = run(train={"steps": 8, "keep": {"last": 9, "best": False, "max_val_loss": 5.4}})
    losses = {record["step"]: record["loss"] for record in records(folder, "eval")}
    expected = {step for step, loss in losses.items() if loss < 5.4} | {8}
    assert saved_steps(folder) == sorted(expected)
    assert len(expected) < len(losses)


def test_bits_per_byte_are_logged_per_source_of_a_mixture(run):
    mixture = [
        {"kind": "tasks", "tasks": ["copy"], "count": 200, "weight": 3},
        {"kind": "tasks", "tasks": ["sort"], "count": 200, "seed": 1},
    ]
    folder = run(data=mixture, eval={"max_samples": 8})
    last = records(folder, "eval")[-1]
    assert sum(key.startswith("bpb.") for key in last) == 2


def test_sft_lowers_the_loss_and_writes_chat_samples(run):
    folder = run(objective={"kind": "sft"}, train={"seq_len": 128, "steps": 8})
    assert records(folder, "train")[-1]["loss"] < records(folder, "train")[0]["loss"]
    assert "assistant" in (folder / "samples.md").read_text()


def test_init_from_starts_from_the_weights_of_the_other_run(run):
    base = run("base")
    data = {key: value for key, value in RECIPE.items() if key not in ("model", "tokenizer")}
    folder = train(from_dict(data | {"init_from": str(base)}), "second")
    assert records(folder, "train")[0]["loss"] < records(base, "train")[0]["loss"] - 0.1
    other = from_dict(data | {"init_from": str(base), "model": {**RECIPE["model"], "depth": 3}})
    with pytest.raises(UserError, match=r"model: differs from that of init_from"):
        train(other, "third")


def test_new_token_ids_get_the_mean_embedding_and_head(capsys):
    tokenizer = train_bpe(["some text to learn from, and some more"] * 3, 290)
    for tied in (True, False):
        config = ModelConfig.from_dict(
            RECIPE["model"] | {"vocab_size": 280, "tie_embeddings": tied}
        )
        lm = LM(config)
        larger = resize_embeddings(lm, tokenizer, RunLog(None))
        assert larger.config.vocab_size == tokenizer.vocab_size
        assert torch.equal(larger.embed.weight[:280], lm.embed.weight)
        mean = lm.embed.weight.mean(0)
        assert torch.allclose(
            larger.embed.weight[280:], mean.expand(larger.config.vocab_size - 280, -1)
        )
        assert torch.allclose(larger.head.weight[-1], lm.head.weight.mean(0))
        assert capsys.readouterr().out.count("\n") == 1
    assert resize_embeddings(larger, tokenizer, RunLog(None)) is larger


def test_training_does_not_depend_on_evaluation_or_samples(run):
    often = run("often", train={"eval_every": 1, "sample_every": 1})
    never = run("never", train={"eval_every": 6, "sample_every": 6})
    one, two = (
        tinsmith.load(folder / "checkpoints" / "step-00000006")[0] for folder in (often, never)
    )
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_every_line_of_metrics_is_json_with_step_and_kind(run):
    folder = run()
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["step"] >= 1
        assert record["kind"] in ("train", "eval", "samples")
    assert records(folder, "train")[-1]["tokens"] == 6 * 4 * 48


def test_a_small_data_set_is_memorised(run):
    folder = run(
        data={"kind": "tasks", "tasks": ["copy"], "count": 12, "length": 3},
        train={
            "steps": 150,
            "batch_size": 8,
            "eval_every": 150,
            "save_every": 150,
            "sample_every": 150,
        },
        log={"every": 50},
    )
    assert records(folder, "train")[-1]["loss"] < 0.7

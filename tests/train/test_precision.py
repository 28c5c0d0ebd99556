"""N6: `train.precision: auto` is measured, reported, and stored with the run."""

import time
from contextlib import contextmanager

import pytest
import torch
import yaml

from tinsmith.config import from_dict
from tinsmith.nn.model import ModelConfig
from tinsmith.train import plan, precision
from tinsmith.train.precision import fastest_precision
from tinsmith.train.trainer import train

LAYER = {
    "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2},
    "feed_forward": {"kind": "swiglu", "hidden_dim": 48},
}
MODEL = {"vocab_size": 320, "dim": 32, "depth": 2, "max_seq_len": 64, "pattern": [LAYER]}
RECIPE = {
    "model": MODEL,
    "data": {"kind": "tasks", "tasks": ["arithmetic"], "count": 60, "digits": 1},
    "objective": {"kind": "pretrain"},
    "train": {"steps": 4, "seq_len": 64, "batch_size": 4, "save_every": 2, "eval_every": 4},
    "eval": {"max_samples": 2, "max_new_tokens": 2},
}


def delay(monkeypatch, **seconds):
    """Add these seconds to forward passes in a precision."""
    original = precision.autocast

    @contextmanager
    def slow_autocast(name, device):
        with original(name, device):
            deadline = time.perf_counter() + seconds.get(name, 0.0)
            while time.perf_counter() < deadline:
                pass
            yield

    monkeypatch.setattr(precision, "autocast", slow_autocast)


@pytest.mark.parametrize(("slow", "expected"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_N6_the_faster_precision_is_selected_by_timing_on_a_cpu(monkeypatch, slow, expected):
    delay(monkeypatch, **{slow: 0.5})
    before = torch.get_rng_state()
    config = ModelConfig.from_dict(MODEL)
    assert fastest_precision(config, torch.device("cpu"), 64) == expected
    assert torch.equal(torch.get_rng_state(), before)


def test_N6_auto_is_the_default_and_its_decision_is_stored_with_the_run(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path))
    monkeypatch.setattr(plan, "fastest_precision", lambda *arguments: "bf16")
    config = from_dict(RECIPE)
    assert config.train.precision == "auto"
    run = train(config, "run")
    assert "bf16 (auto)" in capsys.readouterr().out
    stored = yaml.safe_load((run / "checkpoints" / "step-00000002" / "config.yaml").read_text())
    assert stored["train"]["precision"] == "bf16"
    monkeypatch.setattr(plan, "fastest_precision", lambda *arguments: "fp32")
    resumed = train(config, "resumed", resume_from=run / "checkpoints" / "step-00000002")
    assert "bf16 (auto)" in capsys.readouterr().out
    last = "checkpoints/step-00000004/model.safetensors"
    assert (run / last).read_bytes() == (resumed / last).read_bytes()


def test_N6_a_precision_in_the_recipe_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "fastest_precision", lambda *arguments: pytest.fail("measured"))
    recipe = RECIPE | {"train": RECIPE["train"] | {"precision": "fp16"}}
    assert plan.resolve(from_dict(recipe)).precision == "fp16"

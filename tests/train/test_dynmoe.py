"""Whole runs with resets of dead experts and with routers trained on surprise."""

import shutil

import pytest
import torch

from tinsmith.config import from_dict
from tinsmith.train import checkpoint
from tinsmith.train.trainer import train

INTERVAL = 5
FEED = {"kind": "dyn_moe", "experts": 6, "hidden_dim": 12, "reset_interval": INTERVAL}


@pytest.fixture
def planted(dead_experts):
    """Make every model start with two dead experts."""
    dead_experts(1, 4)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train a small model and return its checkpoints by folder name. With `torn`, delete those from
    step 5 on first and resume, in the middle of a usage window.
    """
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path))

    def train_and_load(name, *, torn=False, feed=None, **changes):
        folder = tmp_path / name / "checkpoints"
        for step in range(INTERVAL, 13) if torn else ():
            shutil.rmtree(folder / f"step-{step:08d}", ignore_errors=True)
        train(recipe(feed or {}, **changes), name, resume=torn)
        return {path.name: checkpoint.load(path) for path in sorted(folder.glob("step-*"))}

    return train_and_load


def recipe(feed, **changes):
    gqa = {"kind": "gqa", "heads": 4, "kv_heads": 2}
    return from_dict(
        {
            "model": {
                **{"vocab_size": 320, "dim": 32, "depth": 2, "max_seq_len": 64},
                "pattern": [{"mixer": gqa, "feed_forward": FEED | feed}],
            },
            "tokenizer": {"train": {"vocab_size": 320}},
            "data": {"kind": "tasks", "count": 300, "digits": 2, "length": 4},
            "objective": {"kind": "pretrain"},
            "optim": {"schedule": {"kind": "wsd", "warmup": 2}},
            "train": {
                **{
                    "steps": 12,
                    "seq_len": 48,
                    "batch_size": 4,
                    "grad_accum_steps": 2,
                    "precision": "fp32",
                },
                **{"save_every": 1, "eval_every": 12, "sample_every": 12},
                "keep": {"last": 12, "best": False},
            }
            | changes,
            "eval": {"max_samples": 4, "max_new_tokens": 4},
            "log": {"every": 4},
        }
    )


def test_dead_experts_and_their_optimizer_state_are_reset_at_the_end_of_a_window(planted, run):
    saved = run("whole", steps=6)
    for layer in (0, 1):
        name = f"blocks.{layer}.feed."
        before, at, after = (saved[f"step-0000000{step}"] for step in (4, 5, 6))
        assert before.model[name + "gate.thresholds"][[1, 4]].min() > 1.5
        assert (at.model[name + "gate.thresholds"][[1, 4]] == 0).all()
        assert at.model[name + "gate.window.newborn"].tolist() == [e in (1, 4) for e in range(6)]
        assert (at.model[name + "experts.down_proj.weight"][[1, 4]] == 0).all()
        for stack in ("gate_proj", "up_proj", "down_proj"):
            momentum = at.optim[f"{name}experts.{stack}.weight|momentum"]
            assert (momentum[[1, 4]] == 0).all()
            assert (momentum[[0, 2, 3, 5]] != 0).any(-1).any(-1).all()
        for moment in ("exp_avg", "exp_avg_sq"):
            assert (at.optim[f"{name}gate.prototypes|{moment}"][[1, 4]] == 0).all()
            assert (at.optim[f"{name}gate.prototypes|{moment}"][0] != 0).any()
        assert (after.model[name + "experts.down_proj.weight"][[1, 4]] != 0).any()
        assert int(after.model[name + "gate.window.steps"]) == 1


@pytest.mark.parametrize(
    "feed",
    [{"router_grad": "smk"}, {"router_grad": "both", "candidates": "active+r"}],
    ids=["smk", "both"],
)
def test_R7_a_run_resumed_in_the_middle_of_a_window_ends_in_the_same_bits(feed, planted, run):
    whole = run("whole", feed=feed)
    run("torn", feed=feed)
    resumed = run("torn", feed=feed, torn=True)
    assert whole.keys() == resumed.keys()
    for step, saved in whole.items():
        for part in ("model", "optim"):
            found, expected = getattr(resumed[step], part), getattr(saved, part)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected), step


def test_activation_checkpointing_changes_no_bit(run):
    feed = {"router_grad": "smk"}
    stored = run("stored", feed=feed)
    recomputed = run("recomputed", feed=feed, activation_checkpointing=True)
    for name, value in stored["step-00000012"].model.items():
        assert torch.equal(value, recomputed["step-00000012"].model[name]), name


def test_micro_batches_give_the_same_usage_counts(planted, run):
    """Counters and recently reset experts are those of the global batch."""
    whole = run("whole", steps=5, batch_size=8, grad_accum_steps=1)
    parts = run("parts", steps=5, batch_size=2, grad_accum_steps=4)
    for layer in (0, 1):
        window = f"blocks.{layer}.feed.gate.window."
        expected, found = whole["step-00000001"].model, parts["step-00000001"].model
        assert expected[window + "load"].sum() > 0
        for counter in ("load", "tokens", "steps", "looks", "newborn"):
            assert torch.equal(found[window + counter], expected[window + counter])
        torch.testing.assert_close(found[window + "unrouted"], expected[window + "unrouted"])
        newborn = window + "newborn"
        assert whole["step-00000005"].model[newborn].tolist() == [e in (1, 4) for e in range(6)]
        assert parts["step-00000005"].model[newborn].tolist() == [e in (1, 4) for e in range(6)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_dyn_moe_trains_in_half_precision(precision, run):
    feed = {"router_grad": "sml", "sml_local": True, "candidates": "active+r"}
    saved = run("half", feed=feed, precision=precision)
    first, last = saved["step-00000001"].model, saved["step-00000012"].model
    name = "blocks.0.feed.gate.prototypes"
    assert last[name].dtype == torch.float32
    assert not torch.equal(first[name], last[name])
    assert all(value.isfinite().all() for value in last.values())

"""Whole runs of models with experts: micro-batches, resume, dry run."""

import shutil

import pytest
import torch

from tinsmith import load
from tinsmith.config import from_dict
from tinsmith.train.dryrun import dry_run
from tinsmith.train.trainer import train

GQA = {"kind": "gqa", "heads": 4, "kv_heads": 2}
TOPK = {"kind": "topk_moe", "experts": 4, "top_k": 2, "hidden_dim": 24, "balance": "none"}
DEEPSEEK = {
    **{"kind": "deepseek_moe", "experts": 6, "top_k": 2, "hidden_dim": 12},
    **{"bias_update_speed": 0.01, "balance_weight": 0.0},
}
NOISY = {"feed_forward": DEEPSEEK | {"noise": 0.1}}
THRESHOLDS = {"experts": 4, "reset_interval": 5}
SML = {"router_grad": "sml", "sml_local": True, "candidates": "all"}
LAYERS = {
    "topk_moe": {"feed_forward": TOPK},
    "deepseek_moe": NOISY,
    "dyn_moe": {"feed_forward": {"kind": "dyn_moe", "hidden_dim": 12} | SML | THRESHOLDS},
    "dyn_heads": {"mixer": {"kind": "dyn_heads", "heads": 4, "kv_heads": 2} | THRESHOLDS},
    "dyn_lora": {"mixer": {"kind": "dyn_lora", "base": GQA, "rank": 2} | THRESHOLDS},
}
"""Layers that route to experts, with the options that have persistent state switched on."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train a small model with experts and return the state_dict of its last checkpoint. With
    `torn`, delete that checkpoint first and resume from the one before.
    """
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path))

    def train_and_load(name, layer, *, torn=False, **changes):
        last = tmp_path / name / "checkpoints" / "step-00000006"
        if torn:
            shutil.rmtree(last)
        train(recipe(layer, **changes), name, resume=torn)
        lm, _ = load(last)
        return lm.state_dict()

    return train_and_load


def recipe(layer, **changes):
    plain = {"mixer": GQA, "feed_forward": {"kind": "swiglu", "hidden_dim": 48}}
    return from_dict(
        {
            "model": {
                **{"vocab_size": 320, "dim": 32, "depth": 2, "max_seq_len": 64},
                "pattern": [plain | layer],
            },
            "tokenizer": {"train": {"vocab_size": 320}},
            "data": {"kind": "tasks", "count": 300, "digits": 2, "length": 4},
            "objective": {"kind": "pretrain"},
            "optim": {
                "matrices": {"kind": "adamw", "lr": 1e-3},
                "schedule": {"kind": "wsd", "warmup": 2},
            },
            "train": {
                **{
                    "steps": 6,
                    "seq_len": 48,
                    "batch_size": 4,
                    "grad_accum_steps": 2,
                    "precision": "fp32",
                },
                **{"save_every": 2, "eval_every": 6, "sample_every": 6},
            }
            | changes,
            "eval": {"max_samples": 4, "max_new_tokens": 4},
            "log": {"every": 1},
        }
    )


def test_T4_micro_batches_give_the_same_weights_and_router_bias(run):
    """The bias is equal to the bit: it moves by fixed steps that depend on global counts."""
    layer = {"feed_forward": DEEPSEEK}
    whole = run("whole", layer, batch_size=8, grad_accum_steps=1)
    parts = run("parts", layer, batch_size=2, grad_accum_steps=4)
    for name, value in whole.items():
        if name.endswith("feed.bias"):
            assert value.abs().max() >= 0.01
            assert torch.equal(value, parts[name]), name
        else:
            torch.testing.assert_close(parts[name], value, rtol=0, atol=3e-5)


@pytest.fixture
def planted(dead_experts):
    """Make every threshold router start with a dead expert."""
    dead_experts(1)


@pytest.mark.parametrize("kind", LAYERS)
def test_T2_a_resumed_run_ends_in_the_same_bits(kind, planted, run):
    """Also if an expert is reset between the resume and the end."""
    layer = LAYERS[kind]
    whole = run("whole", layer)
    run("torn", layer)
    resumed = run("torn", layer, torn=True)
    assert all(value[1] < 1 for name, value in whole.items() if name.endswith("thresholds"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_activation_checkpointing_changes_no_bit(run):
    stored = run("stored", NOISY)
    recomputed = run("recomputed", NOISY, activation_checkpointing=True)
    assert all(torch.equal(value, recomputed[name]) for name, value in stored.items())


def test_a_dry_run_prints_the_number_of_active_parameters(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path))
    dry_run(recipe(LAYERS["topk_moe"]), "x")
    inactive = 2 * 2 * 3 * 32 * 24
    line = next(line for line in capsys.readouterr().out.splitlines() if "parameters" in line)
    total = int(line.split()[1].replace(",", ""))
    assert line.endswith(f"of which a token meets {total - inactive:,}")

"""Two ranks that see different tokens reset the same experts to the same weights."""

import math
from pathlib import Path

import pytest
import torch

from tinsmith.train import checkpoint

DEAD = [1, 4]
STEPS = (1, 2, 3)


@pytest.fixture(scope="session")
def saved(shared_workspace, recipe) -> dict[str, list[checkpoint.Checkpoint]]:
    """Checkpoints after each step of runs on two ranks, by `parallel.kind`. The ranks compare
    weights and optimizer state at the end.
    """
    feed = {"kind": "dyn_moe", "experts": 6, "hidden_dim": 16, "router_grad": "smk"}
    layer = {"mixer": {"kind": "gqa", "heads": 4}, "feed_forward": feed | {"reset_interval": 3}}
    model = {**recipe["model"], "dropout": {}, "pattern": [layer]}
    train = {**recipe["train"], "steps": 4, "save_every": 1, "eval_every": 9, "sample_every": 9}
    train["keep"] = {"last": 9, "best": False}
    program = (Path(__file__).with_name("expert_reset_worker.py"),)
    checkpoints = {}
    for kind in ("ddp", "fsdp"):
        data, name = recipe | {"model": model, "train": train}, f"resets-{kind}"
        code, output = shared_workspace.train_pair(data, name, kind, program=program)
        assert code == 0, output
        assert "compared" in output
        assert "differs" not in output, output
        folder = shared_workspace.runs / name / "checkpoints"
        checkpoints[kind] = [checkpoint.load(folder / f"step-{step:08d}") for step in STEPS]
    return checkpoints


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_reset_the_same_experts(kind, saved):
    _, before, at = saved[kind]
    for layer in (0, 1):
        name = f"blocks.{layer}.feed.gate."
        assert before.model[name + "thresholds"][DEAD].min() > 1.5
        assert (at.model[name + "thresholds"][DEAD] == 0).all()
        assert at.model[name + "window.newborn"].nonzero().flatten().tolist() == DEAD
        moments = at.optim[name + "prototypes|exp_avg"]
        assert (moments[DEAD] == 0).all()
        assert (moments[[0, 2, 3, 5]] != 0).any(-1).all()
        assert int(before.model[name + "window.tokens"]) == 2 * 2 * 4 * 48
        lengths = at.model[name + "prototypes"][DEAD].norm(dim=-1)
        torch.testing.assert_close(lengths, torch.full((len(DEAD),), math.sqrt(32)))


def test_surprise_routers_have_the_same_gradients_under_ddp_and_fsdp(saved):
    """Only the first step: afterwards rounding may change the selection of an expert."""
    one, other = saved["ddp"][0], saved["fsdp"][0]
    for layer in (0, 1):
        name = f"blocks.{layer}.feed.gate.prototypes|exp_avg"
        assert one.optim[name].abs().max() > 1e-5
        torch.testing.assert_close(other.optim[name], one.optim[name], rtol=1e-4, atol=1e-7)

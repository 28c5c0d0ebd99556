"""Memory estimates of a dry run, and the errors that it finds."""

import math

import pytest
import torch

from tinsmith.config import from_dict
from tinsmith.core.errors import UserError
from tinsmith.nn.model import LM
from tinsmith.objectives.pretrain import CrossEntropy
from tinsmith.train.dryrun import dry_run, estimate_memory

MODEL = {
    **{"vocab_size": 320, "dim": 64, "depth": 4},
    "pattern": [{"mixer": {"kind": "gqa"}, "feed_forward": {"kind": "relu2", "hidden_dim": 256}}],
}


def estimate(residual, **train):
    sizes = {"seq_len": 128, "batch_size": 8, "steps": 10} | train
    config = from_dict(
        {
            "model": MODEL | {"residual": residual},
            "data": {"kind": "stdlib"},
            "objective": {"kind": "pretrain"},
            "train": sizes,
        }
    )
    with torch.device("meta"):
        lm = LM(config.model)
    return estimate_memory(lm, config.model, config) - 16 * lm.parameter_count(), config


@pytest.mark.parametrize("kind", ["hyper", "mhyper"])
def test_memory_estimate_counts_residual_streams(kind):
    """Each of 8 sub-layers keeps four streams and the sub-layer's output, in float32."""
    plain, _ = estimate({"kind": "plain"})
    several, _ = estimate({"kind": kind, "streams": 4})
    assert several - plain == 8 * 128 * 8 * 4 * (4 * 64 + 64)


def test_memory_estimate_counts_optimizer_state_of_trainable_weights_only():
    """Bytes per weight of a matrix: Muon 4, AdamW 8, 8-bit AdamW 2; each weight and gradient 4."""
    estimates = {}
    for trained in ("*", "blocks.*.feed"):
        for kind in ("muon", "adamw", "adamw8bit", "adafactor"):
            config = from_dict(
                {
                    "model": MODEL | {"trainable": [trained]},
                    "data": {"kind": "stdlib"},
                    "objective": {"kind": "pretrain"},
                    "optim": {"matrices": {"kind": kind}},
                }
            )
            with torch.device("meta"):
                lm = LM(config.model)
            estimates[trained, kind] = estimate_memory(lm, config.model, config)
    feeds = 4 * 2 * 64 * 256
    attention, rest = 4 * 4 * 64 * 64, 320 * 64 + 9 * 64
    for (trained, kind), state_bytes in zip(estimates, [4, 8, 2, 0] * 2, strict=True):
        matrices = feeds + attention if trained == "*" else feeds
        others = rest if trained == "*" else 0
        expected = (4 + state_bytes) * matrices + 12 * others
        least = estimates["blocks.*.feed", "adafactor"] - 4 * feeds
        assert estimates[trained, kind] - least == expected


def test_memory_estimate_of_checkpointed_blocks_counts_all_streams_at_block_inputs():
    plain, config = estimate({"kind": "plain"}, activation_checkpointing=True)
    several, _ = estimate({"kind": "mhyper", "streams": 4}, activation_checkpointing=True)
    element_bytes = 4 if config.train.precision == "fp32" else 2
    tokens = 8 * 128
    borders = tokens * 2 * 4 * (4 - 1) * 64 * element_bytes
    assert several - plain == pytest.approx(borders + tokens * 2 * 4 * (4 * 64 + 64))


def dry_run_of(objective, **train):
    layer = {"mixer": {"kind": "gqa"}, "feed_forward": {"kind": "relu2", "hidden_dim": 32}}
    model = {"vocab_size": 320, "dim": 32, "depth": 1, "max_seq_len": 64, "pattern": [layer]}
    data = {"kind": "tasks", "tasks": ["arithmetic"], "count": 100}
    recipe = {"model": model, "data": data, "objective": objective}
    dry_run(
        from_dict(recipe | {"train": {"steps": 2, "seq_len": 64, "batch_size": 4} | train}), "dry"
    )


@pytest.fixture
def set_loss(monkeypatch):
    """`set_loss(value, slope)` sets the value of the cross-entropy and scales its gradient."""

    def make(value, slope=1.0):
        original = CrossEntropy.loss

        def loss(self, policy, batch):
            output = original(self, policy, batch)
            gradient_only = (output.total - output.total.detach()) * slope
            return output._replace(total=gradient_only + value)

        monkeypatch.setattr(CrossEntropy, "loss", loss)

    return make


@pytest.mark.parametrize(
    ("value", "slope"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.inf), (1.0, math.nan)]
)
def test_a_nonfinite_first_step_is_refused_in_one_line(value, slope, set_loss, capsys):
    set_loss(value, slope)
    with pytest.raises(UserError, match=r"^the first step is not finite: loss .*gradient") as error:
        dry_run_of({"kind": "sft"})
    assert "\n" not in str(error.value)
    assert "dry run   ok" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "kd", "teacher": "runs/nowhere"},
        {"kind": "on_policy_kd", "teacher": "runs/nowhere"},
        {"kind": "dpo", "reference": "runs/nowhere"},
    ],
    ids=lambda objective: objective["kind"],
)
def test_a_missing_frozen_model_is_refused(objective):
    with pytest.raises(UserError, match=r"objective\.(teacher|reference): .*runs/nowhere"):
        dry_run_of(objective)


@pytest.mark.parametrize("kind", ["grpo", "ppo", "spo"])
def test_minibatches_that_do_not_divide_the_prompts_are_refused(kind):
    objective = {"kind": kind, "max_new_tokens": 4, "num_minibatches": 3}
    with pytest.raises(UserError, match=r"objective\.num_minibatches: 3 must divide the 4 prompts"):
        dry_run_of(objective)
    dry_run_of(objective, batch_size=6)

"""What a dry run estimates."""

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


def estimated(residual, **train):
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
def test_several_streams_are_counted_in_memory(kind):
    """Each of 8 sub-layers keeps four streams and what was said, in float32."""
    plain, _ = estimated({"kind": "plain"})
    several, _ = estimated({"kind": kind, "streams": 4})
    assert several - plain == 8 * 128 * 8 * 4 * (4 * 64 + 64)


def test_what_optimizers_remember_is_that_of_trained_weights_alone():
    """Muon: 4 bytes a weight of a matrix, AdamW: 8, in 8 bits: 2; every weight and gradient: 4."""
    found = {}
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
            found[trained, kind] = estimate_memory(lm, config.model, config)
    feeds = 4 * 2 * 64 * 256
    attention, rest = 4 * 4 * 64 * 64, 320 * 64 + 9 * 64
    for (trained, kind), remembered in zip(found, [4, 8, 2, 0] * 2, strict=True):
        matrices = feeds + attention if trained == "*" else feeds
        others = rest if trained == "*" else 0
        expected = (4 + remembered) * matrices + 12 * others
        least = found["blocks.*.feed", "adafactor"] - 4 * feeds
        assert found[trained, kind] - least == expected


def test_checkpointed_blocks_keep_all_streams_at_their_border():
    plain, config = estimated({"kind": "plain"}, activation_checkpointing=True)
    several, _ = estimated({"kind": "mhyper", "streams": 4}, activation_checkpointing=True)
    wide = 4 if config.train.precision == "fp32" else 2
    tokens = 8 * 128
    borders = tokens * 2 * 4 * (4 - 1) * 64 * wide
    assert several - plain == pytest.approx(borders + tokens * 2 * 4 * (4 * 64 + 64))


def tried(objective, **train):
    layer = {"mixer": {"kind": "gqa"}, "feed_forward": {"kind": "relu2", "hidden_dim": 32}}
    model = {"vocab_size": 320, "dim": 32, "depth": 1, "max_seq_len": 64, "pattern": [layer]}
    data = {"kind": "tasks", "tasks": ["arithmetic"], "count": 100}
    recipe = {"model": model, "data": data, "objective": objective}
    dry_run(
        from_dict(recipe | {"train": {"steps": 2, "seq_len": 64, "batch_size": 4} | train}), "dry"
    )


@pytest.fixture
def loss_of(monkeypatch):
    """Makes the first loss of SFT any number, with its gradient or another."""

    def make(number, slope=1.0):
        own = CrossEntropy.loss

        def loss(self, policy, batch):
            output = own(self, policy, batch)
            steep = (output.total - output.total.detach()) * slope
            return output._replace(total=steep + number)

        monkeypatch.setattr(CrossEntropy, "loss", loss)

    return make


@pytest.mark.parametrize(
    ("number", "slope"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.inf), (1.0, math.nan)]
)
def test_a_first_step_that_is_not_finite_is_refused_in_one_line(number, slope, loss_of, capsys):
    loss_of(number, slope)
    with pytest.raises(UserError, match=r"^the first step is not finite: loss .*gradient") as found:
        tried({"kind": "sft"})
    assert "\n" not in str(found.value)
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
def test_a_frozen_model_that_is_nowhere_is_refused(objective):
    with pytest.raises(UserError, match=r"objective\.(teacher|reference): .*runs/nowhere"):
        tried(objective)


@pytest.mark.parametrize("kind", ["grpo", "ppo", "spo"])
def test_minibatches_that_do_not_divide_the_prompts_are_refused(kind):
    objective = {"kind": kind, "max_new_tokens": 4, "num_minibatches": 3}
    with pytest.raises(UserError, match=r"objective\.num_minibatches: 3 must divide the 4 prompts"):
        tried(objective)
    tried(objective, batch_size=6)

"""Trainable parameters: exactly those that patterns name."""

import pytest
import torch

from tinsmith.core.errors import UserError
from tinsmith.nn import lora
from tinsmith.nn.lora import LoRA
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.nn.parameters import count_parameters

LAYER = {
    "mixer": {"kind": "gqa", "heads": 2, "qk_norm": True},
    "feed_forward": {"kind": "swiglu", "hidden_dim": 24},
}
MODEL = {"vocab_size": 40, "dim": 16, "depth": 2, "max_seq_len": 32, "pattern": [LAYER]}


def model(*trained, **changes):
    return LM(ModelConfig.from_dict(MODEL | {"trainable": list(trained)} | changes))


def names(lm):
    return {name for name, parameter in lm.named_parameters() if parameter.requires_grad}


def test_all_parameters_are_trainable_by_default():
    lm = LM(ModelConfig.from_dict(MODEL))
    assert names(lm) == {name for name, _ in lm.named_parameters()}
    assert count_parameters(lm) == (lm.parameter_count(), 0)


def test_a_pattern_names_modules_or_single_tensors():
    lm = model("blocks.*.feed", "blocks.1.feed_norm.weight", "norm")
    inside = {name for name, _ in lm.named_parameters() if ".feed." in name}
    assert names(lm) == inside | {"blocks.1.feed_norm.weight", "norm.weight"}
    assert count_parameters(lm).trainable == 2 * 3 * 16 * 24 + 16 + 16
    assert sum(count_parameters(lm)) == lm.parameter_count()
    assert (
        str(count_parameters(lm))
        == f"{count_parameters(lm).trainable:,} trained, {count_parameters(lm).frozen:,} frozen"
    )


def test_frozen_tensors_have_no_gradient_but_earlier_layers_do():
    lm = model("blocks.0.feed")
    lm(torch.arange(8)[None]).logits.sum().backward()
    assert {name for name, p in lm.named_parameters() if p.grad is not None} == names(lm)


def test_it_builds_on_the_meta_device_and_survives_a_change_of_dtype():
    with torch.device("meta"):
        shape = model("blocks.*.feed")
    assert names(shape) == names(model("blocks.*.feed").to(torch.bfloat16))


def test_adapters_freeze_what_the_config_trains():
    lm = model("blocks.*.feed")
    lora.add_adapters(lm, LoRA(targets="q_proj", rank=2))
    assert names(lm) == {
        f"blocks.{i}.mixer.q_proj.lora.weight.{half}" for i in (0, 1) for half in "AB"
    }


def test_a_frozen_base_of_dyn_lora_stays_frozen():
    base = LAYER["mixer"]
    mixer = {"kind": "dyn_lora", "base": base, "experts": 4, "rank": 2, "freeze_base": True}
    lm = model("*", pattern=[LAYER | {"mixer": mixer}])
    assert count_parameters(lm).frozen > 0


@pytest.mark.parametrize("trained", ["*", "blocks.*.mixer"])
def test_a_frozen_router_has_no_surprise_gradient(trained):
    feed = {"kind": "dyn_moe", "experts": 4, "hidden_dim": 8, "router_grad": "smk"}
    lm = model(trained, pattern=[LAYER | {"feed_forward": feed}]).train()
    out = lm(torch.arange(8)[None])
    (out.logits.square().mean() + sum(out.losses.values())).backward()
    lm.after_backward(out.grad_probes)
    assert all((block.feed.gate.prototypes.grad is None) == (trained != "*") for block in lm.blocks)


def test_patterns_without_a_match_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"model.trainable: 'bloks.\*.feed' names no tensor"):
        model("bloks.*.feed")
    with pytest.raises(UserError, match="trainable must name at least one tensor"):
        model()
    with pytest.raises(UserError, match=r"Did you mean 'embed\.weight'"):
        model("embed.weigth")


GATED = {
    "dyn_moe": {
        "feed_forward": {"kind": "dyn_moe", "hidden_dim": 8, "experts": 4, "reset_interval": 1}
    },
    "dyn_heads": {"mixer": {"kind": "dyn_heads", "experts": 4, "heads": 2, "reset_interval": 1}},
    "dyn_lora": {
        "mixer": {"kind": "dyn_lora", "base": {"kind": "gqa", "heads": 2}, "experts": 4, "rank": 2}
        | {"reset_interval": 1}
    },
    "deepseek_moe": {
        "feed_forward": {
            "kind": "deepseek_moe",
            "hidden_dim": 8,
            "experts": 4,
            "bias_update_speed": 0.1,
        }
    },
}


def after_a_step(lm: LM) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """State before and after `post_step`, when an expert of a cosine router is dead."""
    with torch.no_grad():
        for name, tensor in lm.named_parameters():
            if name.endswith("thresholds"):
                tensor[0] = 2.0
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    out = lm.train()(torch.arange(12)[None])
    lm.post_step(out.stats)
    return before, lm.state_dict()


def freeze_nothing(lm: LM) -> None:
    """As it was."""


FREEZE = {
    "nothing": freeze_nothing,
    "all": lambda lm: lm.requires_grad_(False),
    "adapters": lambda lm: lora.add_adapters(lm, LoRA(targets="all", rank=2)),
}


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("way", FREEZE)
def test_frozen_routers_are_neither_reinitialised_nor_balanced(kind, way):
    """Else adapters would be written beside a base that is no longer the one they were made for."""
    torch.manual_seed(0)
    lm = model("*", pattern=[LAYER | GATED[kind]])
    FREEZE[way](lm)
    before, after = after_a_step(lm)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert bool(changed) == (way == "nothing"), changed


def test_experts_are_reinitialised_if_the_rest_of_the_model_is_frozen():
    lm = model("blocks.*.feed", pattern=[LAYER | GATED["dyn_moe"]])
    before, after = after_a_step(lm)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".feed." in name}

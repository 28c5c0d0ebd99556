"""Policies that are compared with themselves must have no dropout and no router noise."""

from typing import Any

import pytest

from tinsmith.nn import lora
from tinsmith.objectives.dpo import DPO
from tinsmith.objectives.frozen import deterministic_adapters, deterministic_config
from tinsmith.objectives.grpo import GRPO
from tinsmith.objectives.ppo import PPO
from tinsmith.objectives.spo import SPO

NOISY = {"kind": "deepseek_moe", "experts": 4, "top_k": 2, "hidden_dim": 24, "noise": 0.5}
LAYER = {"mixer": {"kind": "gqa", "heads": 4}, "feed_forward": NOISY}
RESTLESS = [
    *({"dropout": {name: 0.1}} for name in ("embedding", "attention", "residual")),
    *({name: [LAYER]} for name in ("first", "pattern", "last")),
]
DROPS = lora.LoRA(targets="q_proj", rank=2, dropout=0.1)
NO_DRAWS: Any = None
"""The tokenizer, which is not used."""


@pytest.mark.parametrize("config", [DPO(), GRPO(), PPO(), SPO()], ids=lambda config: config.kind)
@pytest.mark.parametrize("model", RESTLESS, ids=str)
def test_a_policy_with_dropout_or_noise_is_refused(model, config, small):
    assert config.deterministic
    lm = small(**model)
    with pytest.raises(ValueError, match="the policy has dropout or router noise"):
        config.build().prepare(lm, NO_DRAWS)
    again = deterministic_config(lm.config)
    assert again == deterministic_config(again)
    DPO().build().prepare(small(**again.to_dict()), NO_DRAWS)


def test_adapters_with_dropout_are_refused_too(small):
    lm, calm = small(), small()
    lora.add_adapters(lm, DROPS)
    with pytest.raises(ValueError, match="the policy has dropout or router noise"):
        DPO().build().prepare(lm, NO_DRAWS)
    lora.add_adapters(calm, deterministic_adapters(DROPS))
    DPO().build().prepare(calm, NO_DRAWS)

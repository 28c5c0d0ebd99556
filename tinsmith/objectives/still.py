"""A policy that is compared with itself is still: nothing in it is drawn at random.

Answers, old log-probabilities and references are computed without dropout. A policy that is trained
with it differs from them before its first step: ratios are clipped, and DPO does not begin at ln 2.
So objectives that compare (`ObjectiveConfigBase.still`) train without dropout (that of adapters
included) and without noise on a router's logits. All else of training mode (statistics of routers,
their losses and biases) stays. A run of theirs leaves a model whose config says so.
"""

from dataclasses import replace

from tinsmith.nn import lora
from tinsmith.nn.config import Dropout, Layer, ModelConfig
from tinsmith.nn.feedforwards.deepseek import DeepSeekMoE
from tinsmith.nn.lora import LoRA
from tinsmith.nn.model import LM


def still_model(config: ModelConfig) -> ModelConfig:
    """The same model without dropout and noise."""
    return replace(
        config,
        dropout=Dropout(),
        first=_still(config.first),
        pattern=_still(config.pattern),
        last=_still(config.last),
    )


def still_adapters(config: LoRA) -> LoRA:
    """The same adapters without dropout."""
    return replace(config, dropout=0.0)


def check_still(policy: LM) -> None:
    """ValueError where something in `policy` is drawn at random."""
    dropped = any(adapter.dropout for adapter in lora.adapters(policy).values())
    if dropped or policy.config != still_model(policy.config):
        raise ValueError(
            "the policy has dropout or router noise, so it differs from itself; build it of "
            "still_model(config) and still_adapters(lora)"
        )


def _still(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    return tuple(
        replace(layer, feed_forward=replace(layer.feed_forward, noise=0.0))
        if isinstance(layer.feed_forward, DeepSeekMoE)
        else layer
        for layer in layers
    )

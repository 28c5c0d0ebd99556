"""The reference of an objective: a frozen model of its own, or the policy without its adapters.

A policy that is compared with itself is deterministic: it has no dropout and no router noise.

Generated answers, old log-probabilities and references are computed without dropout. A policy that
is trained with dropout differs from them before its first step, so ratios would be clipped, and DPO
would not begin at ln 2. Therefore objectives that compare (`ObjectiveConfigBase.deterministic`)
train without dropout, that of adapters included, and without noise on router logits. The rest of
training mode (router statistics, their losses and biases) stays on. The config of the trained model
says so.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from tinsmith.nn import lora
from tinsmith.nn.config import Dropout, Layer, ModelConfig
from tinsmith.nn.feedforwards.deepseek import DeepSeekMoE
from tinsmith.nn.lora import LoRA
from tinsmith.nn.model import LM


@contextmanager
def reference_model(policy: LM, frozen: LM | None) -> Iterator[LM]:
    """The model to compare `policy` with, in eval mode, none of it to be trained.

    `frozen` is what `Objective.frozen` has under the judge's name. Where a run trains adapters, a
    judge that is the policy before its first step is not copied, so it has None: then this is
    `policy` itself, its adapters off, dropout off. Both are as they were afterwards. Raises
    ValueError where there is neither.
    """
    if frozen is None and not lora.adapters(policy):
        raise ValueError("no frozen model, and no adapters to switch off")
    # nothing in it wants a gradient, so none is kept; where gradients are off, norms and attention
    # have other ways to compute, which round differently
    with torch.enable_grad(), nullcontext(frozen) if frozen is not None else _without(policy) as lm:
        yield lm


@contextmanager
def _without(policy: LM) -> Iterator[LM]:
    training = policy.training
    policy.eval()
    try:
        with lora.disable_adapters(policy):
            yield policy
    finally:
        policy.train(training)


def deterministic_config(config: ModelConfig) -> ModelConfig:
    """The same model without dropout and noise."""
    return replace(
        config,
        dropout=Dropout(),
        first=_still(config.first),
        pattern=_still(config.pattern),
        last=_still(config.last),
    )


def deterministic_adapters(config: LoRA) -> LoRA:
    """The same adapters without dropout."""
    return replace(config, dropout=0.0)


def check_deterministic(policy: LM) -> None:
    """ValueError where something in `policy` is drawn at random."""
    dropped = any(adapter.dropout for adapter in lora.adapters(policy).values())
    if dropped or policy.config != deterministic_config(policy.config):
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

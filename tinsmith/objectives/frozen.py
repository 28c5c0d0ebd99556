"""Frozen reference models, and policies without dropout.

The reference of an objective is a frozen model, or the policy with its adapters disabled.

Generated completions, old log-probabilities and references are computed without dropout. A policy
that is trained with dropout differs from them before its first step, so ratios would be clipped,
and the loss of DPO would not begin at ln 2. Therefore objectives that compare
(`ObjectiveConfigBase.deterministic`) train without dropout, including that of adapters, and without
noise on router logits.

They also train without the load-balancing losses of pretraining, unless `router_losses` is set:
measured on one batch, those had 14 % of the norm of the policy gradient with `topk_moe`, and 3
times its norm at the routers of `dyn_moe`. Router statistics, biases of `deepseek_moe` and the
indexer's loss stay on. The config of the trained model records both changes.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from tinsmith.nn import lora
from tinsmith.nn.config import Dropout, Layer, ModelConfig
from tinsmith.nn.feedforwards.deepseek import DeepSeekMoE
from tinsmith.nn.lora import LoRA
from tinsmith.nn.model import LM


@contextmanager
def reference_model(policy: LM, frozen: LM | None) -> Iterator[LM]:
    """Yield the reference model of `policy` in eval mode; it is not trained.

    `frozen` is the entry of `Objective.frozen_models`. A run that trains adapters does not copy the
    policy as its reference, so the entry is None: then this yields `policy` itself with adapters
    and dropout disabled, and restores it afterwards. Raises ValueError if there is neither a frozen
    model nor an adapter.
    """
    if frozen is None and not lora.adapters(policy):
        raise ValueError("no frozen model, and no adapters to disable")
    # no parameter requires a gradient, so no graph is stored; with gradients disabled, norms and
    # attention would use other kernels, which round differently
    with (
        torch.enable_grad(),
        nullcontext(frozen) if frozen is not None else _adapters_disabled(policy) as lm,
    ):
        yield lm


@contextmanager
def _adapters_disabled(policy: LM) -> Iterator[LM]:
    training = policy.training
    policy.eval()
    try:
        with lora.disable_adapters(policy):
            yield policy
    finally:
        policy.train(training)


def deterministic_config(config: ModelConfig) -> ModelConfig:
    """Return the model config without dropout and router noise."""
    return replace(
        config,
        dropout=Dropout(),
        first=_without_noise(config.first),
        pattern=_without_noise(config.pattern),
        last=_without_noise(config.last),
    )


ROUTER_LOSS_WEIGHTS = ("balance_weight", "z_weight", "sdl_weight")


def without_router_losses(config: ModelConfig) -> ModelConfig:
    """Return the model config with the weights of all load-balancing losses set to 0."""

    def changed(part: Any) -> Any:
        weights = [name for name in ROUTER_LOSS_WEIGHTS if hasattr(part, name)]
        return replace(part, **dict.fromkeys(weights, 0.0)) if weights else part

    def layers(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
        return tuple(
            replace(layer, mixer=changed(layer.mixer), feed_forward=changed(layer.feed_forward))
            for layer in layers
        )

    return replace(
        config,
        first=layers(config.first),
        pattern=layers(config.pattern),
        last=layers(config.last),
    )


def deterministic_adapters(config: LoRA) -> LoRA:
    """Return the LoRA config without dropout."""
    return replace(config, dropout=0.0)


def check_deterministic(policy: LM) -> None:
    """Raise ValueError if `policy` has dropout or router noise."""
    has_dropout = any(adapter.dropout for adapter in lora.adapters(policy).values())
    if has_dropout or policy.config != deterministic_config(policy.config):
        raise ValueError(
            "the policy has dropout or router noise, so its outputs are random; build it with "
            "deterministic_config(config) and deterministic_adapters(lora)"
        )


def _without_noise(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    return tuple(
        replace(layer, feed_forward=replace(layer.feed_forward, noise=0.0))
        if isinstance(layer.feed_forward, DeepSeekMoE)
        else layer
        for layer in layers
    )

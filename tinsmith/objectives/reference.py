"""The reference of an objective: a frozen model of its own, or the policy without its adapters."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from tinsmith.nn import lora
from tinsmith.nn.model import LM


@contextmanager
def reference(policy: LM, frozen: LM | None) -> Iterator[LM]:
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
        with lora.disabled(policy):
            yield policy
    finally:
        policy.train(training)

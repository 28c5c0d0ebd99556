"""Mixed precision: autocast of the forward pass, and loss scaling for fp16.

Weights, gradients, moments and every sum stay in float32; `bf16` and `fp16` are autocast. fp16
cannot represent small gradients, so the loss is multiplied by a scale that halves at an overflow
and doubles after many steps without one (Micikevicius et al., 1710.03740). A step with an overflow
is skipped, and not counted as a step that is not finite.
"""

import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from tinsmith.nn.config import ModelConfig
from tinsmith.nn.model import LM
from tinsmith.nn.parameters import ALL_PARAMETERS

Precision = Literal["fp32", "bf16", "fp16"]
TIMED_TOKENS, TIMED_VOCABULARY, TIMED_ROUNDS = 1024, 256, 4
MIN_SPEEDUP = 1.1
"""bf16 must be this much faster than float32 to be selected, so that noise does not decide."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast context of forward passes."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def fastest_precision(config: ModelConfig, device: torch.device, seq_len: int) -> Precision:
    """Return `bf16` if a layer of the model trains clearly faster in it than in float32.

    On a GPU the hardware decides. On a CPU forward and backward of the first layer are timed,
    because bf16 instructions alone do not make a small model faster: casts and other operations
    cost more than products save.
    """
    if device.type != "cpu":
        is_supported = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
        return "bf16" if is_supported else "fp32"
    with torch.random.fork_rng(devices=[]):
        length = min(seq_len, config.max_seq_len, TIMED_TOKENS)
        layer = replace(config, vocab_size=TIMED_VOCABULARY, first=(), last=(), depth=1)
        lm = LM(replace(layer, pattern=config.layers[:1], trainable=ALL_PARAMETERS))
        ids = torch.randint(TIMED_VOCABULARY, (max(1, TIMED_TOKENS // length), length))
    seconds: dict[Precision, float] = {"fp32": math.inf, "bf16": math.inf}
    for _ in range(TIMED_ROUNDS):
        for precision in seconds:
            start = time.perf_counter()
            with autocast(precision, device):
                hidden = lm(ids, logits=False).hidden
            hidden.float().square().sum().backward()
            seconds[precision] = min(seconds[precision], time.perf_counter() - start)
    return "bf16" if MIN_SPEEDUP * seconds["bf16"] < seconds["fp32"] else "fp32"


class LossScaler:
    """Dynamic loss scale. Always 1 unless the precision is fp16."""

    def __init__(self, precision: str, init_scale: float = 2.0**16, growth_interval: int = 2000):
        self.enabled = precision == "fp16"
        self.scale = init_scale if self.enabled else 1.0
        self.growth_interval = growth_interval
        self.steps_since_overflow = 0

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale, in place."""
        if self.enabled:
            gradients = [p.grad for p in parameters if p.grad is not None]
            for gradient in gradients:
                gradient.mul_(1.0 / self.scale)

    def update(self, overflow: bool) -> None:
        """Halve the scale after an overflow; double it after `growth_interval` steps without."""
        if not self.enabled:
            return
        self.steps_since_overflow = 0 if overflow else self.steps_since_overflow + 1
        if overflow:
            self.scale = max(self.scale / 2, 2.0**-14)
        elif self.steps_since_overflow >= self.growth_interval:
            self.scale, self.steps_since_overflow = self.scale * 2, 0

    @property
    def exhausted(self) -> bool:
        """True at the smallest scale, where an overflow has another cause than the scale."""
        return self.scale <= 2.0**-14

    def state(self) -> list[float]:
        """Return the state for a checkpoint."""
        return [self.scale, self.steps_since_overflow]

    def load_state(self, saved: list[float]) -> None:
        """Restore what `state` returned."""
        if self.enabled:
            self.scale, self.steps_since_overflow = saved[0], int(saved[1])

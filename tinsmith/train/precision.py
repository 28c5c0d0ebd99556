"""Number formats of the forward pass, and loss scaling for the one that needs it.

Weights, gradients, moments and every sum stay in float32; `bf16` and `fp16` are autocast. fp16
cannot hold small gradients, so the loss is multiplied by a scale that halves at an overflow and
doubles after a long quiet time (Micikevicius et al., 1710.03740). An overflow is part of the
method: that step is skipped and is not a bad step.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from tinsmith.optim.muon import product_dtype
from tinsmith.train.parallel import pick_device

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which forward passes run."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def fastest() -> str:
    """`bf16` where this machine multiplies it faster than float32, else `fp32`."""
    probe = torch.empty(0, device=pick_device("auto"))
    return "bf16" if product_dtype(probe) == torch.bfloat16 else "fp32"


class LossScale:
    """The factor on the loss; 1 and unmoved unless the precision is fp16."""

    def __init__(self, precision: str, start: float = 2.0**16, growth_interval: int = 2000):
        self.active = precision == "fp16"
        self.value = start if self.active else 1.0
        self.growth_interval = growth_interval
        self.quiet = 0

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale, in place."""
        if self.active:
            gradients = [p.grad for p in parameters if p.grad is not None]
            for gradient in gradients:
                gradient.mul_(1.0 / self.value)

    def update(self, overflow: bool) -> None:
        """After a step: halve at an overflow, double after `growth_interval` steps without one."""
        if not self.active:
            return
        self.quiet = 0 if overflow else self.quiet + 1
        if overflow:
            self.value = max(self.value / 2, 2.0**-14)
        elif self.quiet >= self.growth_interval:
            self.value, self.quiet = self.value * 2, 0

    @property
    def exhausted(self) -> bool:
        """Even the smallest scale overflows: it is not the scale."""
        return self.value <= 2.0**-14

    def state(self) -> list[float]:
        """What a checkpoint keeps."""
        return [self.value, self.quiet]

    def restore(self, saved: list[float]) -> None:
        """Put back what `state` gave."""
        if self.active:
            self.value, self.quiet = saved[0], int(saved[1])

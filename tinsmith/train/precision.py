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

from tinsmith.optim.muon import fast_matmul_dtype
from tinsmith.train.parallel import pick_device

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which forward passes run."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def fastest_precision() -> str:
    """`bf16` where this machine multiplies it faster than float32, else `fp32`."""
    probe = torch.empty(0, device=pick_device("auto"))
    return "bf16" if fast_matmul_dtype(probe) == torch.bfloat16 else "fp32"


class LossScaler:
    """The factor on the loss; 1 and unmoved unless the precision is fp16."""

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
        """After a step: halve at an overflow, double after `growth_interval` steps without one."""
        if not self.enabled:
            return
        self.steps_since_overflow = 0 if overflow else self.steps_since_overflow + 1
        if overflow:
            self.scale = max(self.scale / 2, 2.0**-14)
        elif self.steps_since_overflow >= self.growth_interval:
            self.scale, self.steps_since_overflow = self.scale * 2, 0

    @property
    def exhausted(self) -> bool:
        """Even the smallest scale overflows: it is not the scale."""
        return self.scale <= 2.0**-14

    def state(self) -> list[float]:
        """What a checkpoint keeps."""
        return [self.scale, self.steps_since_overflow]

    def load_state(self, saved: list[float]) -> None:
        """Put back what `state` gave."""
        if self.enabled:
            self.scale, self.steps_since_overflow = saved[0], int(saved[1])

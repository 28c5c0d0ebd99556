"""Tensors that decide, and stay as exact as they are when their model is cast: rounded, they would
choose others.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import ClassVar, Self

import torch
from torch import Tensor, nn


class Fp32Params(nn.Module):
    """A module whose tensors named in `EXACT`, its own, are at least float32 whatever it is cast to
    (between steps: gradients are cast as ever).
    """

    FP32_PARAMS: ClassVar[tuple[str, ...]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: tensor.detach() for name, tensor in self._exact()}
        super()._apply(fn, recurse)
        for name, tensor in self._exact():
            kind = at_least_fp32(tensor.dtype)
            if tensor.dtype != kind:
                tensor.data = before[name].to(tensor.device, kind)
        return self

    def _exact(self) -> list[tuple[str, Tensor]]:
        own = chain(self.named_parameters(recurse=False), self.named_buffers(recurse=False))
        return [(name, tensor) for name, tensor in own if name in self.FP32_PARAMS]


def fp32_param_names(model: nn.Module) -> set[str]:
    """The full names of all such tensors."""
    return {
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        if isinstance(module, Fp32Params)
        for name in module.FP32_PARAMS
    }


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """At least float32: bf16 and fp16 rise, float64 stays."""
    return torch.promote_types(dtype, torch.float32)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """No autocast inside: what is computed here keeps the dtype it is given."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def use_custom_backward() -> bool:
    """Whether a gradient written by hand pays. A compiler fuses the formula better; and it is the
    formula that starts faster, which is what counts for the one token of a decoding step.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()

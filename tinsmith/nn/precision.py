"""Precision of parts that must not be rounded: parameters kept in float32 when the model is cast,
because rounding them would change routing decisions, and computations outside of autocast.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import ClassVar, Self

import torch
from torch import Tensor, nn


class Fp32Params(nn.Module):
    """A module whose own tensors listed in `FP32_PARAMS` stay at least float32 when the module is
    cast.

    Gradients are cast as usual, so cast a model between optimizer steps only.
    """

    FP32_PARAMS: ClassVar[tuple[str, ...]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: tensor.detach() for name, tensor in self._fp32_tensors()}
        super()._apply(fn, recurse)
        for name, tensor in self._fp32_tensors():
            dtype = at_least_fp32(tensor.dtype)
            if tensor.dtype != dtype:
                tensor.data = before[name].to(tensor.device, dtype)
        return self

    def _fp32_tensors(self) -> list[tuple[str, Tensor]]:
        own = chain(self.named_parameters(recurse=False), self.named_buffers(recurse=False))
        return [(name, tensor) for name, tensor in own if name in self.FP32_PARAMS]


def fp32_param_names(model: nn.Module) -> set[str]:
    """Return the full names of all tensors of a model that stay at least float32."""
    return {
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        if isinstance(module, Fp32Params)
        for name in module.FP32_PARAMS
    }


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for bf16 and fp16, and the dtype itself for float32 and float64."""
    return torch.promote_types(dtype, torch.float32)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast, in which operators keep the dtype of their inputs."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def use_custom_backward() -> bool:
    """Return True if a hand-written backward pays off: in eager training. torch.compile fuses the
    formula better, and in decoding the formula has less overhead.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()

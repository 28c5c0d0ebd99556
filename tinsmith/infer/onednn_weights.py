"""Linear layers with weights in the packed layout of oneDNN, for faster decoding on a CPU.

Decoding reads every weight once per token, for a few rows. With so few rows, torch's matrix product
takes at least twice as long as oneDNN's with packed weights (LOG.md). So on a CPU, the engine
decodes with a copy of the model's modules, whose linear layers store a packed copy of their
weights.
"""

import copy
from functools import cache
from types import new_class

import torch
from torch import Tensor, nn

from tinsmith.nn.lora import AdaptedLinear, adapters
from tinsmith.nn.model import LM

PREPACK_BATCH_SIZE = 8
"""Number of rows for which the layout is optimised; other numbers are nearly as fast."""


def prepack_weights(lm: LM) -> LM:
    """Return a copy of the model in eval mode that shares all parameters and packs the weights of
    its linear layers on first use.

    Return `lm` itself if packing is not possible (another device or precision, or several
    processes), or if the model is compiled, because the compiler packs weights itself.
    """
    if not _can_prepack(lm):
        return lm
    shared = {id(tensor): tensor for tensor in (*lm.parameters(), *lm.buffers())}
    decode_model = copy.deepcopy(lm, shared)
    for module in decode_model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = _prepacked_class(type(module))
    return decode_model.eval()


def refresh_prepacked(decode_model: LM, lm: LM) -> LM:
    """Return the prepacked copy of `lm` after its weights may have changed. All weights are packed
    again, because fused optimizers change weights without increasing their version counter.
    """
    reusable = list(map(id, decode_model.parameters())) == list(map(id, lm.parameters()))
    reusable = reusable and _active_adapters(decode_model) == _active_adapters(lm)
    if not reusable or _can_prepack(lm) != (decode_model is not lm):
        return prepack_weights(lm)
    for module in decode_model.modules():
        if isinstance(module, PrepackedLinear):
            module.packed_weight = None
    return decode_model


def _active_adapters(lm: LM) -> list[bool]:
    return [adapter.is_active for adapter in adapters(lm).values()]


def _can_prepack(lm: LM) -> bool:
    is_compiled = getattr(lm, "_compiled_call_impl", None) is not None
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if is_compiled or is_distributed:
        return False
    return all(map(_can_prepack_weight, lm.parameters()))


def _can_prepack_weight(weight: nn.Parameter) -> bool:
    is_plain = type(weight) is nn.Parameter and not weight.is_inference()
    return is_plain and weight.device.type == "cpu" and weight.dtype in _supported_dtypes()


@cache
def _prepacked_class(linear: type[nn.Linear]) -> type[nn.Linear]:
    """Return a subclass of `linear` with the matrix product of PrepackedLinear. A layer with an
    adapter takes its whole forward from PrepackedLinear, whose packed weight includes the adapter.
    """
    if linear is nn.Linear:
        return PrepackedLinear
    if issubclass(linear, AdaptedLinear):
        bases = (PrepackedLinear, linear)
    else:
        bases = (linear, PrepackedLinear)
    return new_class(f"Packed{linear.__name__}", bases)


@cache
def _supported_dtypes() -> frozenset[torch.dtype]:
    """Return the dtypes that oneDNN can pack on this machine."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return frozenset()
    half = {torch.bfloat16} if ops._is_mkldnn_bf16_supported() else set()
    return frozenset({torch.float32} | half)


class PrepackedLinear(nn.Linear):
    """A linear layer that also stores its weight in the packed layout of oneDNN, for inference."""

    packed_weight: Tensor | None = None
    """The packed weight, or None before the first use."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        if self.packed_weight is None:
            self.packed_weight = torch.ops.mkldnn._reorder_linear_weight(
                self.weight.detach(), PREPACK_BATCH_SIZE
            )
        return torch.ops.mkldnn._linear_pointwise(
            input, self.packed_weight, self.bias, "none", [], ""
        )

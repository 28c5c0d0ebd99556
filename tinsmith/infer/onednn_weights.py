"""Products with weights in the order in which oneDNN reads them.

Decoding reads every weight once per token for a handful of rows. On a CPU torch's own product of so
few rows takes twice the time or more of oneDNN's with weights that were laid out for it (LOG.md),
so there the engine works with a copy of the model's modules whose linear layers keep such a second
copy of their weights.
"""

import copy
from functools import cache
from types import new_class

import torch
from torch import Tensor, nn

from tinsmith.nn.lora import AdaptedLinear, adapters
from tinsmith.nn.model import LM

PREPACK_BATCH_SIZE = 8
"""The number of rows that the order is best for; others are served by it nearly as well."""


def prepack_weights(lm: LM) -> LM:
    """A model in eval mode with the same parameters, whose linear layers are packed when they are
    first used; `lm` itself where that is not possible (another device or precision, weights of
    several processes) or of no use (a compiled model packs in its own way).
    """
    if not _possible(lm):
        return lm
    shared = {id(tensor): tensor for tensor in (*lm.parameters(), *lm.buffers())}
    twin = copy.deepcopy(lm, shared)
    for module in twin.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = _packed_kind(type(module))
    return twin.eval()


def refresh_prepacked(decode_model: LM, lm: LM) -> LM:
    """The packed twin of `lm` for its weights of now. Not every change of a weight can be noticed
    (fused optimizers write unseen), so everything is packed again.
    """
    same = list(map(id, decode_model.parameters())) == list(map(id, lm.parameters()))
    same = same and _switches(decode_model) == _switches(lm)
    if not same or _possible(lm) != (decode_model is not lm):
        return prepack_weights(lm)
    for module in decode_model.modules():
        if isinstance(module, PrepackedLinear):
            module.packed_weight = None
    return decode_model


def _switches(lm: LM) -> list[bool]:
    return [adapter.is_active for adapter in adapters(lm).values()]


def _possible(lm: LM) -> bool:
    compiled = getattr(lm, "_compiled_call_impl", None) is not None
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return alone and not compiled and all(map(_packs, lm.parameters()))


def _packs(weight: nn.Parameter) -> bool:
    plain = type(weight) is nn.Parameter and not weight.is_inference()
    return plain and weight.device.type == "cpu" and weight.dtype in _dtypes()


@cache
def _packed_kind(kind: type[nn.Linear]) -> type[nn.Linear]:
    """The class whose product is that of `Packed`, and the rest that of `kind`. An adapted layer
    is nothing but a product, and what is packed of it is the weight with its adapter.
    """
    if kind is nn.Linear:
        return PrepackedLinear
    bases = (PrepackedLinear, kind) if issubclass(kind, AdaptedLinear) else (kind, PrepackedLinear)
    return new_class(f"Packed{kind.__name__}", bases)


@cache
def _dtypes() -> frozenset[torch.dtype]:
    """What this machine's oneDNN packs."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return frozenset()
    half = {torch.bfloat16} if ops._is_mkldnn_bf16_supported() else set()
    return frozenset({torch.float32} | half)


class PrepackedLinear(nn.Linear):
    """A linear layer that keeps its weights in oneDNN's order too, for inference."""

    packed_weight: Tensor | None = None
    """The packed weights; None: not packed yet."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        if self.packed_weight is None:
            self.packed_weight = torch.ops.mkldnn._reorder_linear_weight(
                self.weight.detach(), PREPACK_BATCH_SIZE
            )
        return torch.ops.mkldnn._linear_pointwise(
            input, self.packed_weight, self.bias, "none", [], ""
        )

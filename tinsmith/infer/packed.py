"""Products with weights in the order in which oneDNN reads them.

Decoding reads every weight once per token for a handful of rows. On a CPU torch's own product of so
few rows takes twice the time or more of oneDNN's with weights that were laid out for it (LOG.md),
so there the engine works with a copy of the model's modules whose linear layers keep such a second
copy of their weights.
"""

import copy
from functools import cache
from types import new_class
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tinsmith.nn.model import LM

ROWS = 8
"""The number of rows that the order is best for; others are served by it nearly as well."""


def packed(lm: LM) -> LM:
    """A model with the same parameters whose linear layers are packed; `lm` itself where that is
    not possible, or where it is compiled, which packs in its own way.
    """
    weight = lm.embed.weight
    compiled = getattr(lm, "_compiled_call_impl", None) is not None
    if compiled or weight.device.type != "cpu" or weight.dtype not in _dtypes():
        return lm
    twin = _twins.get(lm)
    if twin is None or list(map(id, twin.parameters())) != list(map(id, lm.parameters())):
        twin = _twins[lm] = _twin(lm)
    return twin.train(lm.training)


_twins: WeakKeyDictionary[LM, LM] = WeakKeyDictionary()
"""What was packed before: a chat asks for it again with every answer."""


def _twin(lm: LM) -> LM:
    shared = {id(tensor): tensor for tensor in (*lm.parameters(), *lm.buffers())}
    twin = copy.deepcopy(lm, shared)
    for module in twin.modules():
        if isinstance(module, nn.Linear) and type(module.weight) is nn.Parameter:
            module.__class__ = _packed_kind(type(module))
    return twin


@cache
def _packed_kind(kind: type[nn.Linear]) -> type[nn.Linear]:
    """The class whose product is that of `Packed`, and the rest that of `kind`."""
    return Packed if kind is nn.Linear else new_class(f"Packed{kind.__name__}", (kind, Packed))


@cache
def _dtypes() -> frozenset[torch.dtype]:
    """What this machine's oneDNN packs."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return frozenset()
    half = {torch.bfloat16} if ops._is_mkldnn_bf16_supported() else set()
    return frozenset({torch.float32} | half)


class Packed(nn.Linear):
    """A linear layer, for inference, that keeps its weights in oneDNN's order too. Weights that
    change are packed again.
    """

    _order: tuple[tuple[int, int] | None, Tensor | None] = (None, None)
    """Which state of the weights was packed, and the packed weights."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        weight = self.weight
        state = (0 if weight.is_inference() else weight._version, weight.data_ptr())
        if state != self._order[0]:
            self._order = state, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        return torch.ops.mkldnn._linear_pointwise(input, self._order[1], self.bias, "none", [], "")

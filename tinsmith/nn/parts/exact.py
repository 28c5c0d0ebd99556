"""Tensors that decide, and stay as exact as they are when their model is cast: rounded, they would
choose others.
"""

from collections.abc import Callable
from itertools import chain
from typing import ClassVar, Self

from torch import Tensor, nn

from tinsmith.nn.parts.norm import wide


class Exact(nn.Module):
    """A module whose tensors named in `EXACT`, its own, are at least float32 whatever it is cast to
    (between steps: gradients are cast as ever).
    """

    EXACT: ClassVar[tuple[str, ...]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: tensor.detach() for name, tensor in self._exact()}
        super()._apply(fn, recurse)
        for name, tensor in self._exact():
            kind = wide(tensor.dtype)
            if tensor.dtype != kind:
                tensor.data = before[name].to(tensor.device, kind)
        return self

    def _exact(self) -> list[tuple[str, Tensor]]:
        own = chain(self.named_parameters(recurse=False), self.named_buffers(recurse=False))
        return [(name, tensor) for name, tensor in own if name in self.EXACT]


def exact_names(model: nn.Module) -> set[str]:
    """The full names of all such tensors."""
    return {
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        if isinstance(module, Exact)
        for name in module.EXACT
    }

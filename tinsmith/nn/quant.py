"""Weights of fewer bits, for models that are only asked: frozen, and made whole again as they are
used.

    int8   w = code * scale, code = round(w / scale), scale = max |row| / 127
    nf4    w = level[code] * scale, scale = max |block| over 64 weights in a row; the 16 levels are
           quantiles of a normal distribution (QLoRA: Dettmers et al., 2305.14314, appendix E)

int8 takes 1 byte a weight and 4 a row, nf4 half a byte and 4 a block: 9/16 of a byte. The codes of
nf4 and their order in memory are those of bitsandbytes. Weights of linear layers and stacks of
experts are held so, in any model; embeddings, the head, norms, and what mixes streams stay as they
are. A product with such a weight is exactly that with the weight made whole, and the gradient
passes on to its input.

Legend: N weights in all, I inputs of a weight (its last axis), K blocks.
"""

from functools import cache
from typing import ClassVar, Literal, Protocol, TypeVar, get_args, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tinsmith.nn.parameters import target_weights

WeightDtype = Literal["fp32", "bf16", "int8", "nf4"]
"""How weights are held: as they were trained, rounded, or in codes."""
M = TypeVar("M", bound=nn.Module)
NF4_BLOCK_SIZE = 64
"""Weights that share a scale in nf4."""
MIN_QUANTIZED_SIZE = 4096
"""Smaller weights stay as they are."""
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Block size of NF4 scales."""


def quantize(model: M, kind: WeightDtype) -> M:
    """Hold the model's weights as `kind` from now on, in place; the model is frozen.

    `bf16` rounds everything and computes in it; with the others the model computes as before.
    ValueError for another name.
    """
    if kind not in get_args(WeightDtype):
        raise ValueError(f"weights={kind} must be one of {', '.join(get_args(WeightDtype))}")
    model.requires_grad_(False)
    if kind == "bf16":
        model.to(torch.bfloat16)
    elif kind != "fp32":
        for module, name in _matrices(model):
            codes = QUANTIZERS[kind](module.get_parameter(name))
            parametrize.register_parametrization(module, name, codes)
    return model


def _matrices(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Weights large enough to be worth it, of modules that declare no other role for them."""
    special = {
        inner
        for module in model.modules()
        if isinstance(module, DeclaresRole) and module.ROLE != "matrix"
        for inner in module.modules()
    }
    return [
        (module, name)
        for _, module, name in target_weights(model)
        if module not in special and module.get_parameter(name).numel() >= MIN_QUANTIZED_SIZE
    ]


@runtime_checkable
class DeclaresRole(Protocol):
    """A module that says what its weights are for: routers do, and what mixes streams."""

    ROLE: ClassVar[str]


def nbytes(model: nn.Module) -> int:
    """Bytes of all that the model holds, codes and scales included, shared tensors once."""
    held = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(held.values())


class Int8(nn.Module):
    """Codes of one byte, a scale per row."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.dtype = weight.dtype

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(..., I) -> codes (..., I), scales (..., 1)."""
        scale = weight.float().abs().amax(-1, keepdim=True) / 127
        codes = (weight.float() / scale.where(scale > 0, 1)).round()
        return codes.to(torch.int8), scale

    def forward(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The weight (..., I)."""
        return (codes * scale).to(self.dtype)


class NF4(nn.Module):
    """Two codes in a byte, a scale per block of 64."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.dtype, self.shape = weight.dtype, weight.shape

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Any shape -> bytes (K * 32,), scales (K,)."""
        flat_N = weight.float().flatten()
        blocks = nn.functional.pad(flat_N, (0, -len(flat_N) % NF4_BLOCK_SIZE)).view(
            -1, NF4_BLOCK_SIZE
        )
        scale_K = blocks.abs().amax(1)
        unit = blocks / scale_K.where(scale_K > 0, 1)[:, None]
        levels = torch.tensor(NF4_LEVELS, device=weight.device)
        codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).flatten()
        return codes[::2] * 16 + codes[1::2], scale_K

    def forward(self, pairs: Tensor, scale_K: Tensor) -> Tensor:
        """The weight, in its shape."""
        blocks = _unpack(pairs, scale_K)
        return blocks.flatten()[: self.shape.numel()].view(self.shape).to(self.dtype)


QUANTIZERS: dict[WeightDtype, type[Int8] | type[NF4]] = {"int8": Int8, "nf4": NF4}
"""How a weight is held in codes: `right_inverse` makes them, `forward` the weight."""


def _unpack(pairs: Tensor, scale_K: Tensor) -> Tensor:
    """The weights of K blocks, (K, 64); on a GPU by bitsandbytes, where it is installed."""
    if pairs.is_cuda and _bitsandbytes():
        shape, kind = (len(scale_K), NF4_BLOCK_SIZE), scale_K.dtype
        unpack = torch.ops.bitsandbytes.dequantize_4bit
        return unpack(pairs[:, None], scale_K, NF4_BLOCK_SIZE, "nf4", shape, kind)
    return dequantize_nf4(pairs, scale_K)


def dequantize_nf4(pairs: Tensor, scale_K: Tensor) -> Tensor:
    """The same in torch alone: both levels of a byte are looked up at once."""
    levels = torch.tensor(NF4_LEVELS, device=pairs.device, dtype=scale_K.dtype)
    both = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), 1)
    return both[pairs.int()].view(-1, NF4_BLOCK_SIZE) * scale_K[:, None]


@cache
def _bitsandbytes() -> bool:
    try:
        import bitsandbytes  # noqa: F401  # registers its operators
    except ImportError:
        return False
    return True

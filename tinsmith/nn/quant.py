"""Weight-only quantisation for inference: weights are frozen and dequantised when they are used.

    int8   w = code * scale, code = round(w / scale), scale = max |row| / 127
    nf4    w = level[code] * scale, scale = max |block| over 64 weights in a row; the 16 levels are
           quantiles of a normal distribution (QLoRA: Dettmers et al., 2305.14314, appendix E)

int8 takes 1 byte per weight and 4 per row, nf4 half a byte per weight and 4 per block: 9/16 of a
byte. The codes of nf4 and their order in memory are those of bitsandbytes. Weights of linear layers
and stacks of experts are quantised, in any model; embeddings, the head, norms, and the mixing
weights of residual streams are not. A product with such a weight is exactly the product with the
dequantised weight, and the gradient reaches its input.

Legend: N weights in total, I inputs of a weight (its last axis), K blocks.
"""

from functools import cache
from typing import ClassVar, Literal, Protocol, TypeVar, get_args, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tinsmith.nn.parameters import target_weights

WeightDtype = Literal["fp32", "bf16", "int8", "nf4"]
"""Storage of weights: as trained, rounded to bf16, or quantised."""
M = TypeVar("M", bound=nn.Module)
NF4_BLOCK_SIZE = 64
"""Number of weights that share a scale in nf4."""
MIN_QUANTIZED_SIZE = 4096
"""Weights with fewer elements are not quantised."""
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 values of NF4 before scaling, ascending."""


def quantize(model: M, kind: WeightDtype) -> M:
    """Convert the model's weights to `kind` in place and freeze the model.

    `bf16` rounds all tensors and computes in bf16; with the other kinds the model computes in its
    dtype. ValueError for an unknown kind.
    """
    if kind not in get_args(WeightDtype):
        raise ValueError(f"weights={kind} must be one of {', '.join(get_args(WeightDtype))}")
    model.requires_grad_(False)
    if kind == "bf16":
        model.to(torch.bfloat16)
    elif kind != "fp32":
        for module, name in _quantizable(model):
            quantizer = QUANTIZERS[kind](module.get_parameter(name))
            parametrize.register_parametrization(module, name, quantizer)
    return model


def _quantizable(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """List weights that are large enough, except in modules that declare another role."""
    excluded = {
        inner
        for module in model.modules()
        if isinstance(module, DeclaresRole) and module.ROLE != "matrix"
        for inner in module.modules()
    }
    return [
        (module, name)
        for _, module, name in target_weights(model)
        if module not in excluded and module.get_parameter(name).numel() >= MIN_QUANTIZED_SIZE
    ]


@runtime_checkable
class DeclaresRole(Protocol):
    """A module that declares the role of its weights, as routers and residual streams do."""

    ROLE: ClassVar[str]


def nbytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers, codes and scales included; shared ones once."""
    sizes = {
        id(tensor): tensor.numel() * tensor.element_size()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(sizes.values())


class Int8(nn.Module):
    """Codes of one byte and a scale per row."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.dtype = weight.dtype

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise (..., I) to codes (..., I) and scales (..., 1)."""
        scale = weight.float().abs().amax(-1, keepdim=True) / 127
        codes = (weight.float() / scale.where(scale > 0, 1)).round()
        return codes.to(torch.int8), scale

    def forward(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Dequantise to the weight (..., I)."""
        return (codes * scale).to(self.dtype)


class NF4(nn.Module):
    """Codes of 4 bits, two in a byte, and a scale per block of 64."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.dtype, self.shape = weight.dtype, weight.shape

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise a weight of any shape to bytes (K * 32,) and scales (K,)."""
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
        """Dequantise to the weight in its shape."""
        blocks = _dequantize_blocks(pairs, scale_K)
        return blocks.flatten()[: self.shape.numel()].view(self.shape).to(self.dtype)


QUANTIZERS: dict[WeightDtype, type[Int8] | type[NF4]] = {"int8": Int8, "nf4": NF4}
"""Parametrisations: `right_inverse` quantises a weight, `forward` dequantises it."""


def _dequantize_blocks(pairs: Tensor, scale_K: Tensor) -> Tensor:
    """Dequantise K blocks to (K, 64); on a GPU with bitsandbytes if it is installed."""
    if pairs.is_cuda and _bitsandbytes():
        shape, dtype = (len(scale_K), NF4_BLOCK_SIZE), scale_K.dtype
        dequantize = torch.ops.bitsandbytes.dequantize_4bit
        return dequantize(pairs[:, None], scale_K, NF4_BLOCK_SIZE, "nf4", shape, dtype)
    return dequantize_nf4(pairs, scale_K)


def dequantize_nf4(pairs: Tensor, scale_K: Tensor) -> Tensor:
    """Dequantise K blocks to (K, 64) in pure torch; one look-up gives both levels of a byte."""
    levels = torch.tensor(NF4_LEVELS, device=pairs.device, dtype=scale_K.dtype)
    level_pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), 1)
    return level_pairs[pairs.int()].view(-1, NF4_BLOCK_SIZE) * scale_K[:, None]


@cache
def _bitsandbytes() -> bool:
    try:
        import bitsandbytes  # noqa: F401  # registers its operators
    except ImportError:
        return False
    return True

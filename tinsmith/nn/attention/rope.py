"""Rotary position embeddings (RoPE; Su et al., 2104.09864), and their scalings for long contexts.

Half-split: dimensions i and i + d/2 are rotated together.

YaRN is that of the paper (Peng et al., 2309.00071) and of transformers. Published Llama folders use
`linear` and `llama3`. Tables are computed from positions in each forward pass, because
`.to(dtype)` would round buffers.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinsmith.core.parse import Config, Kind
from tinsmith.nn.contract import Rotary
from tinsmith.nn.precision import at_least_fp32, use_custom_backward


@dataclass(frozen=True, kw_only=True)
class YarnScaling(Config):
    """YaRN: low frequencies are divided by `factor`, high ones are unchanged, with a ramp in
    between, and attention logits get a temperature.
    """

    kind: Literal["yarn"] = "yarn"
    factor: float
    original_max_seq_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _check_factor(self.factor, self.original_max_seq_len)

    @property
    def attention_scaling(self) -> float:
        """Return the factor of cos and sin: `attention_factor`, or 0.1 ln(factor) + 1."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def apply(self, frequencies: Tensor, theta: float) -> Tensor:
        """Return the scaled frequencies (d/2,)."""
        half = len(frequencies)

        def dimension_of(rotations: float) -> float:
            return (
                2
                * half
                * math.log(self.original_max_seq_len / (rotations * 2 * math.pi))
                / (2 * math.log(theta))
            )

        low = max(math.floor(dimension_of(self.beta_fast)), 0)
        high = min(math.ceil(dimension_of(self.beta_slow)), 2 * half - 1)
        index = torch.arange(half, dtype=frequencies.dtype, device=frequencies.device)
        ramp = ((index - low) / ((high - low) or 1e-3)).clamp(0, 1)
        return frequencies * (1 - ramp + ramp / self.factor)


@dataclass(frozen=True, kw_only=True)
class LinearScaling(Config):
    """Position interpolation (Chen et al., 2306.15595): all frequencies are divided by `factor`."""

    kind: Literal["linear"] = "linear"
    factor: float
    attention_scaling: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def apply(self, frequencies: Tensor, theta: float) -> Tensor:
        """Return the scaled frequencies (d/2,)."""
        return frequencies / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(Config):
    """Llama 3.1's scaling: low frequencies are divided by `factor`, high ones are unchanged, with a
    smooth transition in between.
    """

    kind: Literal["llama3"] = "llama3"
    factor: float
    original_max_seq_len: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_scaling: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        _check_factor(self.factor, self.original_max_seq_len)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must be above "
                f"low_freq_factor={self.low_freq_factor}"
            )

    def apply(self, frequencies: Tensor, theta: float) -> Tensor:
        """Return the scaled frequencies (d/2,)."""
        turns = self.original_max_seq_len * frequencies / (2 * math.pi)
        smooth = (
            (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        ).clamp(0, 1)
        return frequencies * ((1 - smooth) / self.factor + smooth)


def _check_factor(factor: float, original_max_seq_len: int = 1) -> None:
    if factor < 1:
        raise ValueError(f"factor={factor} must be at least 1")
    if original_max_seq_len < 1:
        raise ValueError(f"original_max_seq_len={original_max_seq_len} must be at least 1")


RopeScaling = Annotated[YarnScaling | LinearScaling | Llama3Scaling, Kind()]


@dataclass(frozen=True, kw_only=True)
class Rope(Config):
    """Base `theta` of the frequencies, and an optional scaling for longer contexts."""

    theta: float = 10000.0
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise ValueError(f"theta={self.theta} must be above 1")

    @property
    def attention_scaling(self) -> float:
        """Return the factor of cos and sin."""
        return self.scaling.attention_scaling if self.scaling else 1.0


def frequencies(
    rope: Rope, dim: int, dtype: torch.dtype, device: torch.device | None
) -> tuple[Tensor, float]:
    """Return the angular frequencies theta^(-2i/dim), scaled, (dim/2,), and the factor of cos and
    sin.
    """
    exponents = torch.arange(0, dim, 2, dtype=dtype, device=device) / dim
    plain = 1.0 / torch.tensor(rope.theta, dtype=dtype, device=device) ** exponents
    return (
        rope.scaling.apply(plain, rope.theta) if rope.scaling else plain
    ), rope.attention_scaling


def rotary_tables(rope: Rope, dim: int, positions_BT: Tensor, dtype: torch.dtype) -> Rotary:
    """Return cos and signed sin for `apply_rotary_emb`, (B, T, dim) each, at least float32."""
    kind = at_least_fp32(dtype)
    scaled, factor = frequencies(rope, dim, kind, positions_BT.device)
    angles = positions_BT.to(kind)[..., None] * scaled
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def apply_rotary_emb(x_BTHD: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the vector of every head by the angles of its position: (x1 cos - x2 sin, x2 cos + x1
    sin), in the dtype of x.
    """
    rotate = _Rotate.apply if use_custom_backward() else _rotate
    return rotate(x_BTHD, *rotary)  # type: ignore[no-any-return]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    same = x.to(cos.dtype)
    swapped = same.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(same * cos[:, :, None], swapped, sin[:, :, None]).to(x.dtype)


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half, same = x.shape[-1] // 2, x.to(cos.dtype)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = same * cos
    rotated[..., :half].addcmul_(same[..., half:], sin[..., :half])
    rotated[..., half:].addcmul_(same[..., :half], sin[..., half:])
    return rotated.to(x.dtype)


class _Rotate(torch.autograd.Function):
    """Rotation whose gradient is the inverse rotation, so that x is not saved for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_halves(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate_halves(upstream[0], cos, -sin), None, None

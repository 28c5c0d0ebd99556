"""Rotary position embedding, half-split: dimension i turns with i + d/2 (Su et al., 2104.09864),
and its stretchings.

YaRN is that of the paper (Peng et al., 2309.00071) and of transformers; `linear` and `llama3` are
what published Llama folders ask for. Tables are made from positions when they are used, never
buffers that `.to(dtype)` could round.
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
    """Low frequencies are divided by `factor`, high ones kept, with a ramp between; logits get a
    temperature.
    """

    kind: Literal["yarn"] = "yarn"
    factor: float
    original_max_seq_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _stretches(self.factor, self.original_max_seq_len)

    @property
    def attention_scaling(self) -> float:
        """What cos and sin are multiplied by: 0.1 ln s + 1 unless given."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def apply(self, frequencies: Tensor, theta: float) -> Tensor:
        """Frequencies (d/2,) -> stretched frequencies."""
        half = len(frequencies)

        def turning(rotations: float) -> float:
            return (
                2
                * half
                * math.log(self.original_max_seq_len / (rotations * 2 * math.pi))
                / (2 * math.log(theta))
            )

        low = max(math.floor(turning(self.beta_fast)), 0)
        high = min(math.ceil(turning(self.beta_slow)), 2 * half - 1)
        index = torch.arange(half, dtype=frequencies.dtype, device=frequencies.device)
        ramp = ((index - low) / ((high - low) or 1e-3)).clamp(0, 1)
        return frequencies * (1 - ramp + ramp / self.factor)


@dataclass(frozen=True, kw_only=True)
class LinearScaling(Config):
    """Every frequency divided by `factor` (position interpolation, Chen et al., 2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: float
    attention_scaling: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        _stretches(self.factor)

    def apply(self, frequencies: Tensor, theta: float) -> Tensor:
        """Frequencies (d/2,) -> stretched frequencies."""
        return frequencies / self.factor


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(Config):
    """Llama 3.1's stretching: long wavelengths divided by `factor`, short ones kept, a smooth
    step between.
    """

    kind: Literal["llama3"] = "llama3"
    factor: float
    original_max_seq_len: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_scaling: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        _stretches(self.factor, self.original_max_seq_len)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must be above "
                f"low_freq_factor={self.low_freq_factor}"
            )

    def apply(self, frequencies: Tensor, theta: float) -> Tensor:
        """Frequencies (d/2,) -> stretched frequencies."""
        turns = self.original_max_seq_len * frequencies / (2 * math.pi)
        smooth = (
            (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        ).clamp(0, 1)
        return frequencies * ((1 - smooth) / self.factor + smooth)


def _stretches(factor: float, original_max_seq_len: int = 1) -> None:
    if factor < 1:
        raise ValueError(f"factor={factor} must be at least 1")
    if original_max_seq_len < 1:
        raise ValueError(f"original_max_seq_len={original_max_seq_len} must be at least 1")


RopeScaling = Annotated[YarnScaling | LinearScaling | Llama3Scaling, Kind()]


@dataclass(frozen=True, kw_only=True)
class Rope(Config):
    """Base wavelength and an optional stretching for longer contexts."""

    theta: float = 10000.0
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise ValueError(f"theta={self.theta} must be above 1")

    @property
    def attention_scaling(self) -> float:
        """What cos and sin are multiplied by."""
        return self.scaling.attention_scaling if self.scaling else 1.0


def frequencies(
    rope: Rope, dim: int, dtype: torch.dtype, device: torch.device | None
) -> tuple[Tensor, float]:
    """(dim/2,) angular frequencies theta^(-2i/dim) after scaling, and the factor of cos and sin."""
    exponents = torch.arange(0, dim, 2, dtype=dtype, device=device) / dim
    plain = 1.0 / torch.tensor(rope.theta, dtype=dtype, device=device) ** exponents
    return (
        rope.scaling.apply(plain, rope.theta) if rope.scaling else plain
    ), rope.attention_scaling


def rotary_tables(rope: Rope, dim: int, positions_BT: Tensor, dtype: torch.dtype) -> Rotary:
    """cos and signed sin for `rotate`, each (B, T, dim) in at least float32."""
    kind = at_least_fp32(dtype)
    turn, factor = frequencies(rope, dim, kind, positions_BT.device)
    angles = positions_BT.to(kind)[..., None] * turn
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def apply_rotary_emb(x_BTHD: Tensor, rotary: Rotary) -> Tensor:
    """Turn every head's vector by its position's angle: (x1 cos - x2 sin, x2 cos + x1 sin); same
    dtype out.
    """
    turn = _Rotate.apply if use_custom_backward() else _rotate
    return turn(x_BTHD, *rotary)  # type: ignore[no-any-return]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    same = x.to(cos.dtype)
    swapped = same.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(same * cos[:, :, None], swapped, sin[:, :, None]).to(x.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half, same = x.shape[-1] // 2, x.to(cos.dtype)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = same * cos
    turned[..., :half].addcmul_(same[..., half:], sin[..., :half])
    turned[..., half:].addcmul_(same[..., :half], sin[..., half:])
    return turned.to(x.dtype)


class _Rotate(torch.autograd.Function):
    """The gradient of a turn is the turn back, so nothing of x has to be kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(upstream[0], cos, -sin), None, None

"""What a recipe's `optim:` section may say.

    optim:
      matrices: {kind: muon, lr: 0.02, momentum: 0.95}        # or adamw, adamw8bit, adafactor
      others: {kind: adamw, lr: 3.0e-3, betas: [0.9, 0.95], weight_decay: 0.1}
      schedule: {kind: wsd, warmup: 100, decay: 0.3}          # or cosine, constant
      max_grad_norm: 1.0

`matrices` is the optimizer of the weight matrices inside the blocks, `others` of everything else
(see `groups.partition`); both follow `schedule`.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from tinsmith.core.parse import Config, Count, Kind


def _at_least_zero(name: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name}={value} must be a number of at least 0")


def _below_one(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value} must be at least 0 and below 1")


def _check_adam(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    _at_least_zero("lr", lr)
    _at_least_zero("weight_decay", weight_decay)
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps={eps} must be above 0")
    for index, beta in enumerate(betas):
        _below_one(f"betas[{index}]", beta)


def _check_schedule(warmup: int, final: float) -> None:
    if warmup < 0:
        raise ValueError(f"warmup={warmup} is a number of steps, at least 0")
    if not 0 <= final <= 1:
        raise ValueError(f"min_lr_ratio={final} is a share of the full rate, from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class MuonConfig(Config):
    """Muon (Jordan 2024): momentum, orthogonalised by `ns_steps` of Newton-Schulz.

    `scale` multiplies the orthogonal update of a (rows, columns) matrix: `original` by
    sqrt(max(1, rows / columns)), `match_rms_adamw` by 0.2 sqrt(max(rows, columns)), which makes
    AdamW's rate and decay fit (Moonlight, 2502.16982).
    """

    STATE_BYTES_PER_PARAM: ClassVar[int] = 4
    """Bytes of optimizer state for each weight; so in the others."""

    kind: Literal["muon"] = "muon"
    lr: float = 0.02
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    ns_steps: int = 5
    scale: Literal["original", "match_rms_adamw"] = "original"

    def __post_init__(self) -> None:
        _at_least_zero("lr", self.lr)
        _at_least_zero("weight_decay", self.weight_decay)
        _below_one("momentum", self.momentum)
        if not 1 <= self.ns_steps < 100:
            raise ValueError(f"ns_steps={self.ns_steps} must be from 1 to 99")


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(Config):
    """AdamW (Loshchilov and Hutter, 1711.05101).

    `weight_decay` reaches what `decay` names: the block `matrices` (so it does nothing where Muon,
    with a decay of its own, has those), or `all` but vectors: embedding, head and routers too.
    Norms, biases and other vectors never decay.
    """

    STATE_BYTES_PER_PARAM: ClassVar[int] = 8

    kind: Literal["adamw"] = "adamw"
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: Literal["matrices", "all"] = "matrices"

    def __post_init__(self) -> None:
        _check_adam(self.lr, self.betas, self.eps, self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class AdamW8bitConfig(Config):
    """AdamW whose moments are kept in 8 bits, in blocks of 256 (Dettmers et al., 2110.02861); needs
    bitsandbytes.
    """

    STATE_BYTES_PER_PARAM: ClassVar[int] = 2

    kind: Literal["adamw8bit"] = "adamw8bit"
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        _check_adam(self.lr, self.betas, self.eps, self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class AdafactorConfig(Config):
    """Adafactor (Shazeer and Stern, 1804.04235): no momentum, and of the second moments of a matrix
    only the sums of its rows and columns. The step is `lr` times the weight's own root mean square,
    and `lr` never above 1 / sqrt(step); a step's root mean square is cut to `clip_update`.
    """

    STATE_BYTES_PER_PARAM: ClassVar[int] = 0

    kind: Literal["adafactor"] = "adafactor"
    lr: float = 0.01
    beta2_decay: float = -0.8
    clip_update: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _at_least_zero("lr", self.lr)
        _at_least_zero("weight_decay", self.weight_decay)
        if not -math.inf < self.beta2_decay <= 0:
            raise ValueError(f"beta2_decay={self.beta2_decay} must be at most 0")
        if not self.clip_update >= 1:
            raise ValueError(f"clip_update={self.clip_update} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class WSD(Config):
    """Warm-up, stable, decay: linear up over `warmup` steps, flat, then linear down to `final` over
    the last `decay` of all steps (2405.18392).
    """

    kind: Literal["wsd"] = "wsd"
    warmup: Count = 100
    decay: float = 0.3
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check_schedule(self.warmup, self.min_lr_ratio)
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay={self.decay} is a share of all steps, from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Cosine(Config):
    """Linear up over `warmup` steps, then half a cosine down to `min_lr_ratio` (1608.03983)."""

    kind: Literal["cosine"] = "cosine"
    warmup: Count = 0
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        _check_schedule(self.warmup, self.min_lr_ratio)


@dataclass(frozen=True, kw_only=True)
class Constant(Config):
    """Linear up over `warmup` steps, then flat."""

    kind: Literal["constant"] = "constant"
    warmup: Count = 0

    def __post_init__(self) -> None:
        _check_schedule(self.warmup, 1.0)


MatrixConfig = MuonConfig | AdamWConfig | AdamW8bitConfig | AdafactorConfig
OptimizerConfig = Annotated[MatrixConfig, Kind()]
ScheduleConfig = Annotated[WSD | Cosine | Constant, Kind()]


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Config):
    """The `optim:` section. `clip` is the largest allowed norm of the whole gradient; null leaves
    it alone.
    """

    matrices: OptimizerConfig = MuonConfig()
    others: AdamWConfig = AdamWConfig()
    schedule: ScheduleConfig = WSD()
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm} must be above 0, or null for no clipping"
            )

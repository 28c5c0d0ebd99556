"""Config of the `optim:` section of a recipe: optimizers, schedule and gradient clipping.

    optim:
      matrices: {kind: muon, lr: 0.02, momentum: 0.95}        # or adamw, adamw8bit, adafactor
      others: {kind: adamw, lr: 3.0e-3, betas: [0.9, 0.95]}
      schedule: {kind: wsd, warmup: 100, decay: 0.3}          # or cosine, constant
      max_grad_norm: 1.0

`matrices` is the optimizer of the weight matrices inside the blocks, `others` of all other
parameters (see `groups.partition`); both follow `schedule`.
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


def _check_schedule(warmup: int, min_lr_ratio: float) -> None:
    if warmup < 0:
        raise ValueError(f"warmup={warmup} must be a number of steps of at least 0")
    if not 0 <= min_lr_ratio <= 1:
        raise ValueError(
            f"min_lr_ratio={min_lr_ratio} must be a fraction of the full rate, from 0 to 1"
        )


@dataclass(frozen=True, kw_only=True)
class MuonConfig(Config):
    """Muon (Jordan 2024): momentum, orthogonalised by `ns_steps` of Newton-Schulz.

    `scale` multiplies the orthogonal update of a (rows, columns) matrix: `original` by sqrt(max(1,
    rows / columns)), `match_rms_adamw` by 0.2 sqrt(max(rows, columns)), with which learning rate
    and weight decay of AdamW can be used (Moonlight, 2502.16982).
    """

    STATE_BYTES_PER_PARAM: ClassVar[int] = 4
    """Bytes of optimizer state per parameter; the same in the other classes."""

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

    `decay` selects the parameters with weight decay: the block `matrices` (without effect if Muon,
    which has its own weight decay, trains those), or `all` except vectors: also embedding, head and
    routers. Norms, biases and other vectors have no weight decay.
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
class OthersConfig(AdamWConfig):
    """AdamW for all parameters outside the block matrices, by default without weight decay."""

    weight_decay: float = 0.0

    def warning(self) -> str | None:
        """Return a warning if a weight decay is set that has no effect."""
        if not self.weight_decay or self.decay == "all":
            return None
        return (
            f"optim.others.weight_decay={self.weight_decay:g} has no effect: decay=matrices means "
            "the weights that optim.matrices trains; set decay: all, or leave it out"
        )


@dataclass(frozen=True, kw_only=True)
class AdamW8bitConfig(Config):
    """AdamW with 8-bit moments in blocks of 256 (Dettmers et al., 2110.02861), from
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
    """Adafactor (Shazeer and Stern, 1804.04235): no momentum, factored second moments.

    Of the second moments of a matrix only the sums of rows and columns are stored. The step is `lr`
    times the root mean square of the weight, with `lr` at most 1 / sqrt(step); the root mean square
    of an update is clipped to `clip_update`.
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
    """Warm-up, stable, decay (2405.18392).

    Linear increase over `warmup` steps, constant, then linear decrease to `min_lr_ratio` over the
    last `decay` of all steps.
    """

    kind: Literal["wsd"] = "wsd"
    warmup: Count = 100
    decay: float = 0.3
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check_schedule(self.warmup, self.min_lr_ratio)
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay={self.decay} must be a fraction of all steps, from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Cosine(Config):
    """Linear warm-up over `warmup` steps, then half a cosine down to `min_lr_ratio`
    (1608.03983).
    """

    kind: Literal["cosine"] = "cosine"
    warmup: Count = 0
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        _check_schedule(self.warmup, self.min_lr_ratio)


@dataclass(frozen=True, kw_only=True)
class Constant(Config):
    """Linear warm-up over `warmup` steps, then constant."""

    kind: Literal["constant"] = "constant"
    warmup: Count = 0

    def __post_init__(self) -> None:
        _check_schedule(self.warmup, 1.0)


MatrixConfig = MuonConfig | AdamWConfig | AdamW8bitConfig | AdafactorConfig
OptimizerConfig = Annotated[MatrixConfig, Kind()]
ScheduleConfig = Annotated[WSD | Cosine | Constant, Kind()]


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Config):
    """The `optim:` section. `max_grad_norm` clips the norm of the whole gradient; null: no
    clipping.
    """

    matrices: OptimizerConfig = MuonConfig()
    others: OthersConfig = OthersConfig()
    schedule: ScheduleConfig = WSD()
    max_grad_norm: float | None = 1.0

    @staticmethod
    def for_finetuning(lr: float) -> "OptimConfig":
        """Return the defaults for a trained model: AdamW at a low rate for all parameters, without
        weight decay, and a cosine schedule.
        """
        betas = (0.9, 0.999)
        matrices = AdamWConfig(lr=lr, betas=betas, weight_decay=0.0)
        others = OthersConfig(lr=lr, betas=betas)
        return OptimConfig(matrices=matrices, others=others, schedule=Cosine())

    def __post_init__(self) -> None:
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm} must be above 0, or null for no clipping"
            )

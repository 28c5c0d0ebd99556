"""Policy-gradient losses: the clipped probability ratio of PPO, and the `loss:` of GRPO and SPO.

    ratio = pi(token) / pi_old(token)
    loss  = -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A) of every token (1707.06347, eq. 7)

| kind | ratio of | mean over | paper |
|---|---|---|---|
| grpo | a token | rows, each the mean over its tokens | 2402.03300 |
| dapo | a token | all tokens | 2503.14476 |
| dr_grpo | a token | rows * max_length, which favours no length | 2503.20783 |
| cispo | a token, detached: -sg(min(ratio, 1 + high)) A log pi | all tokens | 2506.13585 |
| gspo | a sequence: exp(mean of its tokens' log ratios) | rows | 2507.18071 |

Tensors are (B, T). Masked positions contribute to no value and no gradient. A ratio is at most
e^20, so that it is finite in float32, and has no gradient beyond.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from tinsmith.core.parse import Config, Kind
from tinsmith.losses.logprobs import MAX_LOG_RATIO, KLLossEstimator, kl


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return ln(pi / pi_old) (B, T), 0 where masked."""
    return torch.where(mask.bool(), logprobs, 0) - torch.where(mask.bool(), old_logprobs, 0)


def expand_advantages(advantages: Tensor, mask: Tensor) -> Tensor:
    """Expand (B,) or (B, T) to (B, T), 0 where masked."""
    expanded = advantages[:, None] if advantages.dim() == 1 else advantages
    return torch.where(mask.bool(), expanded, 0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over tokens with mask 1 of all rows; 0 if there are none."""
    return torch.where(mask.bool(), values, 0).sum() / mask.bool().sum().clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class PolicyLossBase(Config):
    """Base of every policy loss: token-level ratios, clipped as in PPO, mean over all tokens."""

    SCALES_REWARDS: ClassVar[bool] = True
    """Whether the paper of the loss divides advantages by the group's standard deviation."""
    kind: str
    clip_low: float = 0.2
    clip_high: float = 0.2
    """The ratio to the policy that generated the completion is clipped to [1 - clip_low, 1 +
    clip_high].
    """

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low={self.clip_low} must be from 0 to 1")
        if not self.clip_high >= 0:
            raise ValueError(f"clip_high={self.clip_high} must be at least 0")

    def log_ratio(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        """Return the log of the ratio: (B, T) per token, or (B, 1) per sequence."""
        return log_ratio(logprobs, old_logprobs, mask)

    def per_token(
        self, log_ratio: Tensor, advantages: Tensor, logprobs: Tensor, mask: Tensor
    ) -> Tensor:
        """Return the loss of every token (B, T), 0 where masked; `advantages` (B,) or (B, T)."""
        advantages = expand_advantages(advantages, mask)
        ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        return -torch.minimum(ratio * advantages, clipped * advantages)

    def sum(self, per_token: Tensor, mask: Tensor) -> Tensor:
        """Sum the losses over the units of the loss."""
        return per_token.sum()

    def units(self, mask: Tensor, max_length: int) -> Tensor:
        """Count the units of a batch. `max_length` is the largest length of a completion."""
        return mask.bool().sum()

    def is_clipped(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """Return which tokens (B, T) have no gradient because their ratio is out of bounds."""
        advantages = expand_advantages(advantages, mask)
        ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
        above = (ratio > 1 + self.clip_high) & (advantages > 0)
        return above | ((ratio < 1 - self.clip_low) & (advantages < 0))


@dataclass(frozen=True, kw_only=True)
class DAPOLoss(PolicyLossBase):
    """Mean over all tokens (2503.14476)."""

    kind: Literal["dapo"] = "dapo"


@dataclass(frozen=True, kw_only=True)
class GRPOLoss(PolicyLossBase):
    """Mean over rows of the mean over the tokens of a row (2402.03300)."""

    kind: Literal["grpo"] = "grpo"

    def sum(self, per_token: Tensor, mask: Tensor) -> Tensor:
        """Sum the means of the rows."""
        return (per_token.sum(1) / mask.bool().sum(1).clamp(min=1)).sum()

    def units(self, mask: Tensor, max_length: int) -> Tensor:
        """Count the rows."""
        return torch.tensor(len(mask))


@dataclass(frozen=True, kw_only=True)
class DrGRPOLoss(PolicyLossBase):
    """Sum divided by rows * max_length, which favours no length (2503.20783)."""

    SCALES_REWARDS: ClassVar[bool] = False
    kind: Literal["dr_grpo"] = "dr_grpo"

    def units(self, mask: Tensor, max_length: int) -> Tensor:
        """Count rows times the largest length of a completion."""
        return torch.tensor(len(mask) * max_length)


@dataclass(frozen=True, kw_only=True)
class CISPOLoss(PolicyLossBase):
    """REINFORCE weighted by the detached, clipped ratio, mean over all tokens (2506.13585)."""

    kind: Literal["cispo"] = "cispo"

    def per_token(
        self, log_ratio: Tensor, advantages: Tensor, logprobs: Tensor, mask: Tensor
    ) -> Tensor:
        """Return -sg(min(ratio, 1 + clip_high)) A log pi."""
        ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp().clamp(max=1 + self.clip_high).detach()
        return -ratio * expand_advantages(advantages, mask) * torch.where(mask.bool(), logprobs, 0)


@dataclass(frozen=True, kw_only=True)
class GSPOLoss(GRPOLoss):
    """Clipped ratio of whole sequences, mean over rows (GSPO, 2507.18071, equations 5 to 7).

    s_i = exp(1 / |y_i| sum_t ln(pi / pi_old)). The bounds are much closer to 1 than those of
    token-level losses. TRL calls this `importance_sampling_level="sequence"`.
    """

    kind: Literal["gspo"] = "gspo"  # type: ignore[assignment]
    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def log_ratio(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        """Return ln s (B, 1), the mean of the log ratios of a row's tokens."""
        tokens = log_ratio(logprobs, old_logprobs, mask)
        return tokens.sum(1, keepdim=True) / mask.bool().sum(1, keepdim=True).clamp(min=1)


PolicyLoss = Annotated[GRPOLoss | DAPOLoss | DrGRPOLoss | CISPOLoss | GSPOLoss, Kind()]


def kl_penalty(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: KLLossEstimator
) -> Tensor:
    """Return the estimated KL divergence from the reference of every token, 0 where masked."""
    difference = log_ratio(logprobs, ref_logprobs, mask)  # estimators read the difference only
    return kl(difference, torch.zeros_like(difference), estimator)

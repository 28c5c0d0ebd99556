"""The clipped ratio of two policies, as PPO (1707.06347, equation 7) has it and all after it.

    ratio = pi(token) / pi_old(token)
    loss  = -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), of every token

Everything is (B, T); what stands at a masked position has no part in any number or gradient. A
ratio is at most e^20, so that it stays a number in float32, and has no gradient beyond.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from tinsmith.losses.logprobs import MAX_LOG_RATIO, KLLossEstimator, kl


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """ln(pi / pi_old) (B, T), 0 where masked."""
    return torch.where(mask.bool(), logprobs, 0) - torch.where(mask.bool(), old_logprobs, 0)


def ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """pi / pi_old (B, T), 1 where masked."""
    return log_ratio(logprobs, old_logprobs, mask).clamp(max=MAX_LOG_RATIO).exp()


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """The loss (B, T) of every token, 0 where masked; `advantages` (B,) or (B, T)."""
    advantages = expand_advantages(advantages, mask)
    moved = ratio(logprobs, old_logprobs, mask)
    return -torch.minimum(moved * advantages, moved.clamp(1 - clip_low, 1 + clip_high) * advantages)


def is_clipped(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """Which tokens (B, T) get no gradient because their ratio has left its bounds."""
    advantages = expand_advantages(advantages, mask)
    moved = ratio(logprobs, old_logprobs, mask)
    return ((moved > 1 + clip_high) & (advantages > 0)) | (
        (moved < 1 - clip_low) & (advantages < 0)
    )


def expand_advantages(advantages: Tensor, mask: Tensor) -> Tensor:
    """(B,) or (B, T) -> (B, T), 0 where masked."""
    wide = advantages[:, None] if advantages.dim() == 1 else advantages
    return torch.where(mask.bool(), wide, 0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over masked tokens of all rows; 0 where there are none."""
    return torch.where(mask.bool(), values, 0).sum() / mask.bool().sum().clamp(min=1)


LossName = Literal["grpo", "dapo", "dr_grpo", "cispo"]


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    loss: LossName,
    max_length: int | None = None,
    kl_estimator: KLLossEstimator = "k3",
) -> Tensor:
    """One scalar. Log-probabilities (B, T) of the sampled tokens, `advantages` (B,) or (B, T),
    `mask` (B, T); the ratio is clipped to [1 - clip_low, 1 + clip_high]. `ref_logprobs` may
    be None where `kl_coef` is 0. `dr_grpo` wants `max_length`, the longest an answer may be.

    Masked positions get exactly zero gradient; no tokens at all give 0. ValueError for an unknown
    `loss`, for `dr_grpo` without `max_length`, and for a `kl_coef` without `ref_logprobs`.
    """
    each = token_loss(
        logprobs,
        old_logprobs,
        ref_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        kl_coef=kl_coef,
        loss=loss,
        kl_estimator=kl_estimator,
    )
    return sum_over_units(each, mask, loss) / units(mask, loss, max_length).clamp(min=1)


def sum_over_units(token_losses: Tensor, mask: Tensor, loss: LossName) -> Tensor:
    """The sum over a loss's units: rows for `grpo`, each the mean over its tokens, tokens else."""
    if loss == "grpo":
        return (token_losses.sum(1) / mask.bool().sum(1).clamp(min=1)).sum()
    return token_losses.sum()


def units(mask: Tensor, loss: LossName, max_length: int | None) -> Tensor:
    """How many units the rows hold."""
    if loss == "dr_grpo":
        if max_length is None:
            raise ValueError("loss=dr_grpo wants max_length, the longest an answer may be")
        return torch.tensor(len(mask) * max_length)
    return torch.tensor(len(mask)) if loss == "grpo" else mask.bool().sum()


def token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    loss: LossName,
    kl_estimator: KLLossEstimator = "k3",
) -> Tensor:
    """The loss (B, T) of every token, 0 where masked. ValueError as in `grpo_loss`."""
    if loss not in get_args(LossName):
        raise ValueError(f"loss={loss} must be grpo, dapo, dr_grpo or cispo")
    if loss == "cispo":
        held = ratio(logprobs, old_logprobs, mask).clamp(max=1 + clip_high).detach()
        each = -held * expand_advantages(advantages, mask) * torch.where(mask.bool(), logprobs, 0)
    else:
        each = clipped_surrogate(logprobs, old_logprobs, advantages, mask, clip_low, clip_high)
    if kl_coef == 0:
        return each
    if ref_logprobs is None:
        raise ValueError(f"kl_coef={kl_coef} requires ref_logprobs, which are None")
    # the difference is all that an estimator looks at
    away = log_ratio(logprobs, ref_logprobs, mask)
    return each + kl_coef * kl(away, torch.zeros_like(away), kl_estimator)

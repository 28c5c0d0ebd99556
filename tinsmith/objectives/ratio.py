"""The clipped ratio of two policies, as PPO (1707.06347, equation 7) has it and all after it.

    ratio = pi(token) / pi_old(token)
    loss  = -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), of every token

Everything is (B, T); what stands at a masked position has no part in any number or gradient. A
ratio is at most e^20, so that it stays a number in float32, and has no gradient beyond.
"""

import torch
from torch import Tensor

from tinsmith.objectives.logprobs import HIGHEST


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """ln(pi / pi_old) (B, T), 0 where masked."""
    return torch.where(mask.bool(), logprobs, 0) - torch.where(mask.bool(), old_logprobs, 0)


def ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """pi / pi_old (B, T), 1 where masked."""
    return log_ratio(logprobs, old_logprobs, mask).clamp(max=HIGHEST).exp()


def surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    low: float,
    high: float,
) -> Tensor:
    """The loss (B, T) of every token, 0 where masked; `advantages` (B,) or (B, T)."""
    advantages = per_token(advantages, mask)
    moved = ratio(logprobs, old_logprobs, mask)
    return -torch.minimum(moved * advantages, moved.clamp(1 - low, 1 + high) * advantages)


def clipped(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    low: float,
    high: float,
) -> Tensor:
    """Which tokens (B, T) get no gradient because their ratio has left its bounds."""
    advantages = per_token(advantages, mask)
    moved = ratio(logprobs, old_logprobs, mask)
    return ((moved > 1 + high) & (advantages > 0)) | ((moved < 1 - low) & (advantages < 0))


def per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """(B,) or (B, T) -> (B, T), 0 where masked."""
    wide = advantages[:, None] if advantages.dim() == 1 else advantages
    return torch.where(mask.bool(), wide, 0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over masked tokens of all rows; 0 where there are none."""
    return torch.where(mask.bool(), values, 0).sum() / mask.bool().sum().clamp(min=1)

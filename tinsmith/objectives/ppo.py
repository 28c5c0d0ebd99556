"""Proximal policy optimisation, token by token (1707.06347, GAE 1506.02438).

    delta_t = r_t + gamma V_(t+1) - V_t        A_t = sum_l (gamma lambda)^l delta_(t+l)
    r_t     = -kl_coef * (ln pi_old - ln pi_ref)_t + [t is last] R
    loss    = clipped surrogate + value_coef * clipped value loss

V_t is read at the state before action t, so it cannot see what it judges.
"""

import torch
from torch import Tensor

from tinsmith.objectives.ratio import masked_mean, surrogate


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (B, T) from rewards, values and mask (B, T); 0 where masked.

    `values[t]` is V before action t, and 0 after the last masked-in token. Positions that the mask
    leaves out are no actions: what stands between two answers is passed over. Advantages are not
    whitened; returns are advantages + values.
    """
    acted = mask.bool()
    advantages = torch.zeros_like(values)
    after, ahead = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        here, value = acted[:, t], values[:, t]
        delta = rewards[:, t] + gamma * after - value
        ahead = torch.where(here, delta + gamma * lam * ahead, ahead)
        after = torch.where(here, value, after)
        advantages[:, t] = torch.where(here, ahead, 0)
    return advantages, torch.where(acted, advantages + values, 0)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> Tensor:
    """The clipped surrogate, a scalar: the mean over masked tokens of
    -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A). All (B, T), `advantages` (B,) or (B, T).
    """
    return masked_mean(surrogate(logprobs, old_logprobs, advantages, mask, clip, clip), mask)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> Tensor:
    """The clipped value loss, a scalar: the mean over masked tokens of half the larger of
    (V - R)^2 and (clip(V, V_old - clip, V_old + clip) - R)^2. All (B, T).
    """
    return masked_mean(token_value_loss(values, old_values, returns, mask, clip), mask)


def token_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> Tensor:
    """The same of every token (B, T), 0 where masked."""
    new, old, goal = (torch.where(mask.bool(), each, 0) for each in (values, old_values, returns))
    near = old + (new - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((new - goal).square(), (near - goal).square())

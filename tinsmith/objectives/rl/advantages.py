"""Advantages: whitening over all processes, group-relative advantages, and GAE."""

import torch
from torch import Tensor

from tinsmith.distributed.group import Peers


def whiten(values: Tensor, mask: Tensor, peers: Peers) -> Tensor:
    """Normalise masked-in values of all processes: (values - mean) / (population deviation + 1e-8);
    0 outside the mask. `mask` has the shape of `values`.
    """
    own = torch.where(mask, values, 0).double()
    parts = peers.gather({"values": values[mask].double()})
    known = torch.cat([part["values"].to(own.device) for part in parts])
    if not len(known):
        return torch.zeros_like(values)
    centred = (own - known.mean()) / (known.std(correction=0) + 1e-8)
    return torch.where(mask, centred, 0).to(values.dtype)


def group_advantages(rewards: Tensor, *, scale: bool = True) -> Tensor:
    """Return group-relative advantages (P, G) of the rewards (P, G) of G completions of each of P
    prompts: minus the group's mean and, with `scale`, divided by its population standard deviation
    + 1e-4. Equal rewards give exactly 0. Integer rewards are converted to torch's default float.
    """
    if not rewards.is_floating_point():
        rewards = rewards.to(torch.get_default_dtype())
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.std(1, keepdim=True, correction=0) + 1e-4 if scale else 1.0
    return torch.where(zero_variance_groups(rewards)[:, None], 0, centred / spread)


def zero_variance_groups(rewards: Tensor) -> Tensor:
    """Mark the groups (P,) of rewards (P, G) that are all equal and so have no gradient."""
    return rewards.amax(1) == rewards.amin(1)


def fill_missing_rewards(rewards: Tensor) -> Tensor:
    """Replace rewards (P, G) that are not finite by the mean of the others in the row, or by 0."""
    there = torch.isfinite(rewards)
    mean = torch.where(there, rewards, 0).sum(1) / there.sum(1).clamp(min=1)
    return torch.where(there, rewards, mean[:, None])


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns (B, T) of rewards, values and mask (B, T); 0 outside the mask.

    `values[t]` is V before action t, and 0 after the last masked-in token. Positions outside the
    mask are no actions: observations between two turns are skipped. Advantages are not whitened;
    returns are advantages + values.
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

"""Mean 0 and deviation 1 over everything that all processes have in hand."""

import torch
from torch import Tensor

from tinsmith.distributed.group import Peers


def whiten(values: Tensor, mask: Tensor, peers: Peers) -> Tensor:
    """(values - mean) / (population deviation + 1e-8) over masked-in values of all processes; 0
    where masked. Any shape; `mask` of the same.
    """
    own = torch.where(mask, values, 0).double()
    parts = peers.gather({"values": values[mask].double()})
    known = torch.cat([part["values"].to(own.device) for part in parts])
    if not len(known):
        return torch.zeros_like(values)
    centred = (own - known.mean()) / (known.std(correction=0) + 1e-8)
    return torch.where(mask, centred, 0).to(values.dtype)


def group_advantages(rewards: Tensor) -> Tensor:
    """(P, G) rewards of G answers to each of P prompts -> (P, G) advantages: less the group's mean,
    over its population standard deviation + 1e-4. Equal rewards give exactly 0. Whole rewards are
    taken as torch's default float.
    """
    if not rewards.is_floating_point():
        rewards = rewards.to(torch.get_default_dtype())
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.std(1, keepdim=True, correction=0) + 1e-4
    return torch.where(zero_variance_groups(rewards)[:, None], 0, centred / spread)


def zero_variance_groups(rewards: Tensor) -> Tensor:
    """(P,) groups of (P, G) whose rewards are all equal: they teach nothing."""
    return rewards.amax(1) == rewards.amin(1)


def fill_missing_rewards(rewards: Tensor) -> Tensor:
    """(P, G) rewards with the mean of its row, or else 0, wherever one is not a number."""
    there = torch.isfinite(rewards)
    mean = torch.where(there, rewards, 0).sum(1) / there.sum(1).clamp(min=1)
    return torch.where(there, rewards, mean[:, None])


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

"""Proximal policy optimisation, token by token (1707.06347, GAE 1506.02438).

    delta_t = r_t + gamma V_(t+1) - V_t        A_t = sum_l (gamma lambda)^l delta_(t+l)
    r_t     = -beta * (ln pi_old - ln pi_ref)_t + [t is last] R
    loss    = clipped surrogate + value_coef * clipped value loss

V_t is read at the state before action t, so it cannot see what it judges.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tinsmith.data.prompts import Prompt
from tinsmith.infer.generate import evaluating
from tinsmith.nn.model import LM, ModelOut
from tinsmith.objectives.base import Loss, Metric, aux_metrics, with_aux
from tinsmith.objectives.online import Online, OnlineObjective
from tinsmith.objectives.outcomes import told
from tinsmith.objectives.ratio import masked_mean, surrogate
from tinsmith.objectives.rollout import Rollout
from tinsmith.objectives.whiten import whitened
from tinsmith.text.tokenizer import Tokenizer


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


@dataclass(frozen=True, kw_only=True)
class PPO(Online):
    """One answer to each prompt, judged token by token against a learned value.

    `beta` weighs the KL divergence inside the reward, by the estimator k1.
    """

    kind: Literal["ppo"] = "ppo"
    gamma: float = 1.0
    lam: float = 0.95
    critic: Literal["head", "model"] = "head"
    """Values from a head on the policy's last hidden states, or from a model of their own that
    begins as a copy of the policy.
    """
    value_coef: float = 0.5
    value_clip: float = 0.2
    whiten: bool = True
    """Advantages of a rollout get mean 0 and deviation 1."""
    max_moved: float | None = None
    """Early stop: where half the mean squared log-ratio to the policy that answered is above it,
    that step is not taken, and the rest of the rollout is left.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1")
        for name in ("value_coef", "value_clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if self.max_moved is not None and not self.max_moved > 0:
            raise ValueError(f"max_moved={self.max_moved} must be above 0")

    def build(self) -> "ActorCritic":
        """The objective."""
        return ActorCritic(self)


class ActorCritic(OnlineObjective):
    """The unit is a token."""

    def __init__(self, config: PPO):
        super().__init__(config)
        self.config = config
        self.trunk: LM | None = None
        self.value: nn.Linear

    def prepare(self, policy: LM, tokenizer: Tokenizer) -> None:
        """Values begin as 0."""
        super().prepare(policy, tokenizer)
        weight = policy.embed.weight
        self.value = nn.Linear(policy.config.dim, 1, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)
        if self.config.critic == "model":
            self.trunk = copy.deepcopy(policy)
            if not policy.config.tie_embeddings:  # nothing asks it for logits
                self.trunk.head.requires_grad_(False)

    def values(self, out: ModelOut, rows: Rollout) -> Tensor:
        """(B, T): V before the token that position t is to predict."""
        hidden = out.hidden
        if self.trunk is not None:
            hidden = self.trunk(rows.ids, segments=rows.segments, logits=False).hidden
        return self.value(hidden)[..., 0].to(rows.old.dtype)

    def judged(self, policy: LM, prompts: list[Prompt], rows: Rollout) -> Rollout:
        """Advantages and returns by the values of now."""
        config = self.config
        with evaluating(policy), torch.no_grad():
            values = self.values(policy(rows.ids, segments=rows.segments, logits=False), rows)
        away = torch.where(rows.mask, rows.old - rows.reference, 0)
        rewards = at_the_end(rows.rewards, rows.mask) - config.beta * away
        advantages, returns = gae(rewards, values, rows.mask, config.gamma, config.lam)
        if config.whiten:
            advantages = whitened(advantages, rows.mask, self.peers)
        return rows._replace(values=values, advantages=advantages, returns=returns)

    def weight(self, batch: Rollout) -> Tensor:
        """Tokens that were said."""
        return batch.mask.sum()

    def loss(self, policy: LM, batch: Rollout) -> Loss:
        """One forward pass for probabilities and values."""
        config, count, mask = self.config, self.weight(batch), batch.mask
        logprobs, out = self.logprobs(policy, batch)
        low, high = config.clip_low, config.clip_high
        acting = surrogate(logprobs, batch.old, batch.advantages, mask, low, high).sum()
        values = self.values(out, batch)
        judging = token_value_loss(values, batch.values, batch.returns, mask, config.value_clip)
        judging = judging.sum()
        total = acting + config.value_coef * judging
        metrics = {
            "loss": Metric(total.detach(), count),
            "policy_loss": Metric(acting.detach(), count),
            "value_loss": Metric(judging.detach(), count),
        }
        metrics |= told(self.config, batch, logprobs) | aux_metrics(out.losses, count)
        return Loss(with_aux(total, out.losses, count), metrics, out.stats, out.probes)

    def accept(self, means: dict[str, float]) -> bool:
        """No step that has gone too far, and then a new rollout."""
        limit = self.config.max_moved
        if limit is None or means.get("moved_k2", 0.0) <= limit:
            return True
        self.place = self.config.minibatches * self.config.updates
        return False


def at_the_end(rewards: Tensor, mask: Tensor) -> Tensor:
    """(B,) rewards -> (B, T), each at its row's last masked-in position, 0 where there is none."""
    later = mask.long().flip(1).cumsum(1).flip(1)
    return torch.where(mask & (later == 1), rewards[:, None], 0)

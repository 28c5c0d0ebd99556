"""Proximal policy optimisation, token by token (1707.06347, GAE 1506.02438).

    delta_t = r_t + gamma V_(t+1) - V_t        A_t = sum_l (gamma lambda)^l delta_(t+l)
    r_t     = -beta * (ln pi_old - ln pi_ref)_t + [t is last] R
    loss    = clipped surrogate + value_coef * clipped value loss

V_t is the value of the state before action t, so it does not depend on that action.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tinsmith.data.formats.prompts import Prompt
from tinsmith.infer.generate import eval_mode
from tinsmith.losses.policy import DAPOLoss, log_ratio, masked_mean
from tinsmith.nn.model import LM, ModelOut
from tinsmith.objectives.base import Loss, Metric, add_aux_losses, aux_metrics
from tinsmith.objectives.rl.advantages import gae, whiten
from tinsmith.objectives.rl.base import RLConfig, RLObjective
from tinsmith.objectives.rl.metrics import rollout_metrics
from tinsmith.objectives.rl.rollout import RolloutBatch
from tinsmith.text.tokenizer import Tokenizer


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> Tensor:
    """Return the clipped surrogate, a scalar: the mean over masked tokens of
    -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A). All (B, T), `advantages` (B,) or (B, T).
    """
    surrogate = DAPOLoss(clip_low=clip, clip_high=clip)
    ratio = log_ratio(logprobs, old_logprobs, mask)
    return masked_mean(surrogate.per_token(ratio, advantages, logprobs, mask), mask)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> Tensor:
    """Return the clipped value loss, a scalar: the mean over masked tokens of half the larger of
    (V - R)^2 and (clip(V, V_old - clip, V_old + clip) - R)^2. All (B, T).
    """
    return masked_mean(token_value_loss(values, old_values, returns, mask, clip), mask)


def token_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> Tensor:
    """Return the clipped value loss of every token (B, T), 0 outside the mask."""
    new, old, target = (torch.where(mask.bool(), x, 0) for x in (values, old_values, returns))
    clipped = old + (new - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((new - target).square(), (clipped - target).square())


@dataclass(frozen=True, kw_only=True)
class PPO(RLConfig):
    """One completion per prompt, with a value model as baseline for every token.

    `kl_coef` weighs the KL divergence inside the reward, by the estimator k1.
    """

    kind: Literal["ppo"] = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    """The ratio to the policy that generated the completion is clipped to [1 - clip_low, 1 +
    clip_high].
    """
    gamma: float = 1.0
    lam: float = 0.95
    critic: Literal["head", "model"] = "head"
    """Values come from a head on the policy's last hidden states, or from a separate model that is
    initialised as a copy of the policy.
    """
    value_coef: float = 0.5
    value_clip: float = 0.2
    whiten: bool = True
    """If True, advantages of a rollout are normalised to mean 0 and standard deviation 1."""
    target_kl: float | None = None
    """Early stopping: if half the mean squared log-ratio (`approx_kl`) is above it, the step is
    skipped and the rest of the rollout is dropped. In nats per token.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.policy_loss
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1")
        for name in ("value_coef", "value_clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if self.target_kl is not None and not self.target_kl > 0:
            raise ValueError(f"target_kl={self.target_kl} must be above 0")

    @property
    def policy_loss(self) -> DAPOLoss:
        """Return the clipped surrogate, averaged over tokens."""
        return DAPOLoss(clip_low=self.clip_low, clip_high=self.clip_high)

    def build(self) -> "PPOObjective":
        """Build the objective."""
        return PPOObjective(self)


class PPOObjective(RLObjective):
    """PPO with a value model. The unit of the loss is a response token."""

    def __init__(self, config: PPO):
        super().__init__(config)
        self.config = config
        self.trunk: LM | None = None
        self.value: nn.Linear

    def prepare(self, policy: LM, tokenizer: Tokenizer) -> None:
        """Build the value head, which is initialised to 0, and the value model if there is one."""
        super().prepare(policy, tokenizer)
        weight = policy.embed.weight
        self.value = nn.Linear(policy.config.dim, 1, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)
        if self.config.critic == "model":
            self.trunk = copy.deepcopy(policy)
            if not policy.config.tie_embeddings:  # it computes no logits
                self.trunk.head.requires_grad_(False)

    def values(self, out: ModelOut, rows: RolloutBatch) -> Tensor:
        """Return the values (B, T): V of the state before the token that position t predicts."""
        hidden = out.hidden
        if self.trunk is not None:
            hidden = self.trunk(rows.ids, segments=rows.segments, logits=False).hidden
        return self.value(hidden)[..., 0].to(rows.old_logprobs.dtype)

    def compute_advantages(
        self, policy: LM, prompts: list[Prompt], rows: RolloutBatch
    ) -> RolloutBatch:
        """Compute advantages and returns (GAE) with the current values."""
        config = self.config
        with eval_mode(policy), torch.no_grad():
            values = self.values(policy(rows.ids, segments=rows.segments, logits=False), rows)
        away = torch.where(rows.mask, rows.old_logprobs - rows.ref_logprobs, 0)
        rewards = rewards_at_last_token(rows.rewards, rows.mask) - config.kl_coef * away
        advantages, returns = gae(rewards, values, rows.mask, config.gamma, config.lam)
        if config.whiten:
            advantages = whiten(advantages, rows.mask, self.peers)
        return rows._replace(values=values, advantages=advantages, returns=returns)

    def units(self, batch: RolloutBatch) -> Tensor:
        """Count response tokens."""
        return batch.mask.sum()

    def loss(self, policy: LM, batch: RolloutBatch) -> Loss:
        """Compute the policy loss and the value loss in one forward pass, summed over tokens."""
        config, count, mask = self.config, self.units(batch), batch.mask
        logprobs, out = self.logprobs(policy, batch)
        surrogate = config.policy_loss
        ratio = surrogate.log_ratio(logprobs, batch.old_logprobs, mask)
        policy_sum = surrogate.per_token(ratio, batch.advantages, logprobs, mask).sum()
        values = self.values(out, batch)
        per_token = token_value_loss(values, batch.values, batch.returns, mask, config.value_clip)
        value_sum = per_token.sum()
        total = policy_sum + config.value_coef * value_sum
        metrics = {
            "loss": Metric(total.detach(), count),
            "policy_loss": Metric(policy_sum.detach(), count),
            "value_loss": Metric(value_sum.detach(), count),
        }
        clipped = surrogate.is_clipped(ratio.detach(), batch.advantages, mask)
        metrics |= rollout_metrics(self.config, batch, logprobs, clipped)
        metrics |= aux_metrics(out.losses, count)
        return Loss(add_aux_losses(total, out.losses, count), metrics, out.stats, out.grad_probes)

    def accept_step(self, means: dict[str, float]) -> bool:
        """Skip the step and drop the rollout if `approx_kl` is above `target_kl`."""
        limit = self.config.target_kl
        if limit is None or means.get("approx_kl", 0.0) <= limit:
            return True
        self.minibatch_index = self.config.num_minibatches * self.config.num_epochs
        return False


def rewards_at_last_token(rewards: Tensor, mask: Tensor) -> Tensor:
    """Return rewards (B,) as (B, T): at the last masked-in position of each row, 0 elsewhere."""
    later = mask.long().flip(1).cumsum(1).flip(1)
    return torch.where(mask & (later == 1), rewards[:, None], 0)

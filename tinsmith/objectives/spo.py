"""Single-stream Policy Optimization (2509.13232): one completion per prompt, with the tracked value
of the prompt as baseline.

    A = r - value(prompt), before the tracker is updated with r; then (A - mean) / (std + 1e-8)

over the rollouts of all processes. The value tracker (section 3) has a Beta distribution for each
prompt:

    value = alpha / (alpha + beta)                                  before the completion
    rho   = 2^(-D / kl_half_life), between rho_min and rho_max
    alpha <- rho alpha + r,   beta <- rho beta + 1 - r              after it

D is the distance of the policy from the one that sampled the previous completion of this prompt:
the mean |ln pi - ln pi_then| over the tokens of that completion, measured when the prompt comes
again. `ResponseCache` keeps these completions with their log-probabilities. A constant rho averages
over 1 / (1 - rho) completions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tinsmith.core.rng import derive_seed
from tinsmith.data.formats.prompts import Prompt
from tinsmith.infer.generate import eval_mode
from tinsmith.losses.logprobs import row_sums
from tinsmith.losses.policy import expand_advantages
from tinsmith.nn.model import LM
from tinsmith.objectives.grpo import CriticFreeConfig, CriticFreeObjective
from tinsmith.objectives.rl.advantages import whiten
from tinsmith.objectives.rl.rollout import Rollout, RolloutBatch, collate


class ValueTracker:
    """One Beta distribution per prompt, in float64; (1/2, 1/2) for an unknown prompt."""

    def __init__(
        self, *, rho_min: float = 0.875, rho_max: float = 0.96, kl_half_life: float = 0.06
    ):
        for name, value in (("rho_min", rho_min), ("rho_max", rho_max)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value} must be at least 0 and below 1")
        if rho_min > rho_max:
            raise ValueError(f"rho_min={rho_min} must not be above rho_max={rho_max}")
        if not kl_half_life > 0:
            raise ValueError(f"kl_half_life={kl_half_life} must be above 0")
        self.rho_min, self.rho_max, self.kl_half_life = rho_min, rho_max, kl_half_life
        self.state: dict[int, tuple[float, float]] = {}
        """(alpha, beta) by prompt id."""

    def init_prompt(self, prompt: int, rewards: Sequence[float]) -> None:
        """Initialise a prompt with N rewards in [0, 1]: alpha + beta = 1 / (1 - rho_min), divided
        as (sum + 1/2) to (N - sum + 1/2).
        """
        count, right = len(rewards), sum(map(_clamped, rewards))
        weight = 1 / (1 - self.rho_min) / (count + 1) if count else 1.0
        self.state[prompt] = (weight * (right + 0.5), weight * (count - right + 0.5))

    def value(self, prompt: int) -> float:
        """Return the expected reward in [0, 1] of the next completion."""
        alpha, beta = self.state.get(prompt, (0.5, 0.5))
        return alpha / (alpha + beta)

    def rho(self, distance: float) -> float:
        """Return the decay of alpha and beta for a policy that moved by `distance` (nats per
        token).
        """
        return min(max(2 ** (-distance / self.kl_half_life), self.rho_min), self.rho_max)

    def update(self, prompt: int, reward: float, distance: float) -> None:
        """Update a prompt with the reward of a completion, clamped to [0, 1]."""
        alpha, beta = self.state.get(prompt, (0.5, 0.5))
        rho, reward = self.rho(distance), _clamped(reward)
        self.state[prompt] = (rho * alpha + reward, rho * beta + 1 - reward)

    def copy(self) -> "ValueTracker":
        """Return a copy with the same state."""
        other = ValueTracker(
            rho_min=self.rho_min, rho_max=self.rho_max, kl_half_life=self.kl_half_life
        )
        other.state = dict(self.state)
        return other

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint: `numbers`, the prompt ids (N,) int64, and `shares`
        (N, 2) float64, alpha and beta.
        """
        numbers = torch.tensor(list(self.state), dtype=torch.int64)
        shares = torch.tensor(list(self.state.values()), dtype=torch.float64).reshape(-1, 2)
        return {"numbers": numbers, "shares": shares}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        shares = (tuple(pair) for pair in saved["shares"].tolist())
        self.state = dict(zip(saved["numbers"].tolist(), shares, strict=True))


def _clamped(reward: float) -> float:
    return min(max(reward, 0.0), 1.0)


class CachedResponse(NamedTuple):
    """One row of a rollout without padding. All fields are (L,)."""

    ids: Tensor
    """int32, without the last id."""
    targets: Tensor
    mask: Tensor
    old: Tensor


class ResponseCache:
    """The newest completion of every prompt, by prompt id."""

    def __init__(self, responses: Mapping[int, CachedResponse] | None = None):
        self.responses = dict(responses or {})

    def __contains__(self, prompt_id: int) -> bool:
        return prompt_id in self.responses

    def copy(self) -> "ResponseCache":
        """Return a copy. Completions are shared because they are never changed."""
        return ResponseCache(self.responses)

    def store(self, prompt_ids: Sequence[int], rows: RolloutBatch) -> None:
        """Store row i of a rollout as the newest completion of prompt `prompt_ids[i]`."""
        lengths = (rows.segments >= 0).sum(1).tolist()
        for row, (prompt_id, length) in enumerate(zip(prompt_ids, lengths, strict=True)):
            ids, targets, mask, old = (
                part[row, :length].cpu().clone()
                for part in (rows.ids, rows.targets, rows.mask, rows.old_logprobs)
            )
            self.responses[prompt_id] = CachedResponse(ids.int(), targets.int(), mask, old)

    def get_batch(self, prompt_ids: Sequence[int], device: torch.device) -> RolloutBatch:
        """Return the completions of these prompts as rows."""
        return collate([_rollout(self.responses[each]) for each in prompt_ids], device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint: `numbers` (prompt ids) and `lengths`, both (N,), and
        the fields of all completions, concatenated.
        """
        parts = CachedResponse._make(
            torch.cat([getattr(each, name) for each in self.responses.values()] or [empty])
            for name, empty in zip(CachedResponse._fields, _empty_response(), strict=True)
        )
        numbers = torch.tensor(list(self.responses), dtype=torch.int64)
        lengths = torch.tensor(
            [len(each.ids) for each in self.responses.values()], dtype=torch.int64
        )
        return {"numbers": numbers, "lengths": lengths} | parts._asdict()

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Tensor]) -> "ResponseCache":
        """Restore what `state_dict` returned."""
        lengths = saved["lengths"].tolist()
        columns = (saved[name].cpu().split(lengths) for name in CachedResponse._fields)
        each = (CachedResponse(*parts) for parts in zip(*columns, strict=True))
        return cls(dict(zip(saved["numbers"].tolist(), each, strict=True)))


def _empty_response() -> CachedResponse:
    whole = torch.zeros(0, dtype=torch.int32)
    return CachedResponse(whole, whole, whole.bool(), whole.float())


def _rollout(cached: CachedResponse) -> Rollout:
    rollout = Rollout([*cached.ids[:1].tolist(), *cached.targets.tolist()], seed=0)
    rollout.response_mask = [False, *cached.mask.tolist()]
    rollout.logprobs = [0.0, *cached.old.tolist()]
    return rollout


__all__ = ["SPO", "SPOObjective", "ValueTracker"]


@dataclass(frozen=True, kw_only=True)
class SPO(CriticFreeConfig):
    """One completion per prompt, with the tracked value of the prompt as baseline."""

    kind: Literal["spo"] = "spo"
    rho_min: float = 0.875
    rho_max: float = 0.96
    kl_half_life: float = 0.06
    """Distance of the policy, in nats per token, that halves the weight of earlier rewards."""
    warmup_samples: int = 0
    """Extra completions of a prompt that comes for the first time. They initialise its value and
    are not trained on.
    """
    reward_min: float = 0.0
    reward_max: float = 1.0
    """Rewards are mapped from [reward_min, reward_max] to [0, 1]."""
    whiten: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations != 1:
            raise ValueError(
                f"num_generations={self.num_generations} must be 1: spo has a single stream"
            )
        if self.warmup_samples < 0:
            raise ValueError(f"warmup_samples={self.warmup_samples} must be at least 0")
        if not self.reward_min < self.reward_max:
            raise ValueError(
                f"reward_min={self.reward_min} must be below reward_max={self.reward_max}"
            )
        self.new_tracker()

    def new_tracker(self) -> ValueTracker:
        """Return a tracker without prompts."""
        return ValueTracker(
            rho_min=self.rho_min, rho_max=self.rho_max, kl_half_life=self.kl_half_life
        )

    def build(self) -> "SPOObjective":
        """Build the objective."""
        return SPOObjective(self)


class SPOObjective(CriticFreeObjective):
    """SPO with value tracker and response cache. Both are equal on all processes, because each
    process updates them with the completions of all.
    """

    def __init__(self, config: SPO):
        super().__init__(config)
        self.config = config
        self.tracker = config.new_tracker()
        self.response_cache = ResponseCache()

    def compute_advantages(
        self, policy: LM, prompts: list[Prompt], rows: RolloutBatch
    ) -> RolloutBatch:
        """Subtract the tracked values from the rewards, then update tracker and cache."""
        self.tracker = self.tracker.copy()  # a snapshot holds the old ones
        self.response_cache = self.response_cache.copy()
        self._init_new_prompts(policy, prompts)
        prompt_ids = [prompt.prompt_id for prompt in prompts]
        rewards = self.normalize_rewards(rows.rewards)
        values = torch.tensor([self.tracker.value(prompt_id) for prompt_id in prompt_ids])
        advantages = torch.nan_to_num(rewards - values.to(rewards))
        if self.config.whiten:
            advantages = whiten(advantages, rows.mask.any(1), self.peers)
        self._update(prompt_ids, rewards, self.distances(policy, prompt_ids), rows)
        return rows._replace(advantages=expand_advantages(advantages, rows.mask))

    def normalize_rewards(self, rewards: Tensor) -> Tensor:
        """Map rewards to [0, 1]. NaN stays NaN."""
        config = self.config
        return ((rewards - config.reward_min) / (config.reward_max - config.reward_min)).clamp(0, 1)

    def distances(self, policy: LM, prompt_ids: list[int]) -> Tensor:
        """Return the distance of the policy (P,) on the cached completion of each prompt, or 0 if
        there is none.
        """
        distances = torch.zeros(len(prompt_ids), dtype=torch.float64)
        cached = [i for i, prompt_id in enumerate(prompt_ids) if prompt_id in self.response_cache]
        if cached:
            device = policy.embed.weight.device
            rows = self.response_cache.get_batch([prompt_ids[i] for i in cached], device)
            with eval_mode(policy), torch.no_grad():
                logprobs = self.logprobs(policy, rows)[0]
            sums = row_sums((logprobs - rows.old_logprobs).abs(), rows.mask)
            distances[cached] = (sums / rows.mask.sum(1).clamp(min=1)).double().cpu()
        return distances

    def _init_new_prompts(self, policy: LM, prompts: list[Prompt]) -> None:
        """Initialise the values of new prompts with `warmup_samples` extra completions."""
        count = self.config.warmup_samples
        if not count:
            return
        new = [prompt for prompt in prompts if prompt.prompt_id not in self.tracker.state]
        seeds = [
            derive_seed(self.config.seed, "first", prompt.prompt_id, i)
            for prompt in new
            for i in range(count)
        ]
        repeated = [prompt for prompt in new for _ in range(count)]
        rollouts = self.generate(policy, repeated, seeds)
        own = {
            "prompt_ids": torch.tensor([prompt.prompt_id for prompt in new]),
            "rewards": self.normalize_rewards(self.score(repeated, rollouts)),
        }
        for part in self.peers.gather(own):
            rewards = part["rewards"].view(-1, count).tolist()
            for prompt_id, group in zip(part["prompt_ids"].tolist(), rewards, strict=True):
                self.tracker.init_prompt(int(prompt_id), [r for r in group if math.isfinite(r)])

    def _update(
        self, prompt_ids: list[int], rewards: Tensor, distances: Tensor, rows: RolloutBatch
    ) -> None:
        """Update tracker and cache with the completions of all processes, in the order of ranks."""
        own = {
            "prompt_ids": torch.tensor(prompt_ids),
            "normalized": rewards,
            "distances": distances,
        }
        for part in self.peers.gather(own | rows._asdict()):
            ids = part["prompt_ids"].tolist()
            fields = {name: part[name] for name in RolloutBatch._fields}
            self.response_cache.store(ids, RolloutBatch(**fields))
            updates = zip(ids, part["normalized"].tolist(), part["distances"].tolist(), strict=True)
            for prompt_id, reward, distance in updates:
                if math.isfinite(reward):
                    self.tracker.update(prompt_id, reward, distance)

    def snapshot(self) -> Any:
        """Return the rollout, the position in it, tracker and cache."""
        return super().snapshot(), self.tracker, self.response_cache

    def restore_snapshot(self, snapshot: Any) -> None:
        """Return to the state of `snapshot`."""
        rollout, self.tracker, self.response_cache = snapshot
        super().restore_snapshot(rollout)

    def rank_state(self) -> dict[str, Tensor]:
        """Add tracker and cache to the current rollout."""
        return (
            super().rank_state()
            | _named("tracker.", self.tracker.state_dict())
            | _named("memory.", self.response_cache.state_dict())
        )

    def load_rank_state(self, saved: dict[str, Tensor]) -> None:
        """Restore what `rank_state` returned."""
        tracker, memory = _part("tracker.", saved), _part("memory.", saved)
        self.tracker.load_state_dict(tracker)
        self.response_cache = ResponseCache.from_state_dict(memory)
        super().load_rank_state(_rest(saved))

    def reshard_rank_state(
        self, parts: list[dict[str, Tensor]], rank: int, world_size: int
    ) -> dict[str, Tensor]:
        """Return a share of the rows, and the tracker and cache, which are equal on all ranks."""
        kept = {name: part for name, part in parts[0].items() if "." in name}
        return super().reshard_rank_state([_rest(part) for part in parts], rank, world_size) | kept


def _named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _part(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    chosen = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor for name, tensor in chosen.items()}


def _rest(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "." not in name}

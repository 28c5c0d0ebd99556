"""Single-stream Policy Optimization (2509.13232): one answer to each prompt, judged against what
that prompt is expected to earn.

    A = r - value(prompt), before the tracker takes r in; then (A - mean) / (std + 1e-8)

over the rollouts of all processes. How far the policy has moved since it last answered a prompt is
the mean |ln pi - ln pi_then| over the tokens of that answer, measured when the prompt comes again.

The last answer to every prompt, with its log-probabilities when it was given.

What a prompt's next answer is expected to earn: the value tracker of Single-stream Policy
Optimization (2509.13232, section 3).

    value = alpha / (alpha + beta)                                  before the answer
    rho   = 2^(-D / half), between rho_min and rho_max
    alpha <- rho alpha + r,   beta <- rho beta + 1 - r              after it

D says how far the policy has moved since it last answered this prompt; a constant rho remembers
1 / (1 - rho) answers.
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
    """One Beta distribution per prompt, in float64; a prompt that was never met has (1/2, 1/2)."""

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
        """Start a prompt from N earlier rewards in [0, 1]: alpha + beta = 1 / (1 - rho_min), shared
        as (sum + 1/2) to (N - sum + 1/2).
        """
        count, right = len(rewards), sum(map(_held, rewards))
        weight = 1 / (1 - self.rho_min) / (count + 1) if count else 1.0
        self.state[prompt] = (weight * (right + 0.5), weight * (count - right + 0.5))

    def value(self, prompt: int) -> float:
        """The reward in [0, 1] that is expected of the next answer."""
        alpha, beta = self.state.get(prompt, (0.5, 0.5))
        return alpha / (alpha + beta)

    def rho(self, distance: float) -> float:
        """How much of the past is kept after the policy has moved by `distance`, in nats per
        token.
        """
        return min(max(2 ** (-distance / self.kl_half_life), self.rho_min), self.rho_max)

    def update(self, prompt: int, reward: float, distance: float) -> None:
        """Take in the reward of an answer, held to [0, 1]."""
        alpha, beta = self.state.get(prompt, (0.5, 0.5))
        rho, reward = self.rho(distance), _held(reward)
        self.state[prompt] = (rho * alpha + reward, rho * beta + 1 - reward)

    def copy(self) -> "ValueTracker":
        """Another that may learn more."""
        other = ValueTracker(
            rho_min=self.rho_min, rho_max=self.rho_max, kl_half_life=self.kl_half_life
        )
        other.state = dict(self.state)
        return other

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint: `numbers` (N,) int64 and `shares` (N, 2) float64, alpha and beta."""
        numbers = torch.tensor(list(self.state), dtype=torch.int64)
        shares = torch.tensor(list(self.state.values()), dtype=torch.float64).reshape(-1, 2)
        return {"numbers": numbers, "shares": shares}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """The inverse of `saved`."""
        shares = (tuple(pair) for pair in saved["shares"].tolist())
        self.state = dict(zip(saved["numbers"].tolist(), shares, strict=True))


def _held(reward: float) -> float:
    return min(max(reward, 0.0), 1.0)


class CachedResponse(NamedTuple):
    """One row without its padding: everything (L,)."""

    ids: Tensor
    """int32, without the last id."""
    targets: Tensor
    mask: Tensor
    old: Tensor


class ResponseCache:
    """Answers by the number of their prompt."""

    def __init__(self, responses: Mapping[int, CachedResponse] | None = None):
        self.responses = dict(responses or {})

    def __contains__(self, number: int) -> bool:
        return number in self.responses

    def copy(self) -> "ResponseCache":
        """Another that may learn more; answers are never changed."""
        return ResponseCache(self.responses)

    def store(self, numbers: Sequence[int], rows: RolloutBatch) -> None:
        """Row i of a rollout is the newest answer to prompt `numbers[i]`."""
        lengths = (rows.segments >= 0).sum(1).tolist()
        for row, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
            ids, targets, mask, old = (
                part[row, :length].cpu().clone()
                for part in (rows.ids, rows.targets, rows.mask, rows.old_logprobs)
            )
            self.responses[number] = CachedResponse(ids.int(), targets.int(), mask, old)

    def get_batch(self, numbers: Sequence[int], device: torch.device) -> RolloutBatch:
        """The answers to these prompts, as rows."""
        return collate([_episode(self.responses[number]) for number in numbers], device)

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint: `numbers` and `lengths` (N,), and everything else end to end."""
        parts = CachedResponse._make(
            torch.cat([getattr(each, name) for each in self.responses.values()] or [empty])
            for name, empty in zip(CachedResponse._fields, _nothing(), strict=True)
        )
        numbers = torch.tensor(list(self.responses), dtype=torch.int64)
        lengths = torch.tensor(
            [len(each.ids) for each in self.responses.values()], dtype=torch.int64
        )
        return {"numbers": numbers, "lengths": lengths} | parts._asdict()

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Tensor]) -> "ResponseCache":
        """The inverse of `saved`."""
        lengths = saved["lengths"].tolist()
        columns = (saved[name].cpu().split(lengths) for name in CachedResponse._fields)
        each = (CachedResponse(*parts) for parts in zip(*columns, strict=True))
        return cls(dict(zip(saved["numbers"].tolist(), each, strict=True)))


def _nothing() -> CachedResponse:
    whole = torch.zeros(0, dtype=torch.int32)
    return CachedResponse(whole, whole, whole.bool(), whole.float())


def _episode(kept: CachedResponse) -> Rollout:
    episode = Rollout([*kept.ids[:1].tolist(), *kept.targets.tolist()], seed=0)
    episode.response_mask = [False, *kept.mask.tolist()]
    episode.logprobs = [0.0, *kept.old.tolist()]
    return episode


__all__ = ["SPO", "SPOObjective", "ValueTracker"]


@dataclass(frozen=True, kw_only=True)
class SPO(CriticFreeConfig):
    """One answer to each prompt, and a tracker of what every prompt is expected to earn."""

    kind: Literal["spo"] = "spo"
    rho_min: float = 0.875
    rho_max: float = 0.96
    kl_half_life: float = 0.06
    """The distance, in nats per token, after which half of what is known counts."""
    warmup_samples: int = 0
    """Answers to a prompt that is met for the first time, for its tracker to begin with; nothing
    is learned from them.
    """
    reward_min: float = 0.0
    reward_max: float = 1.0
    """The rewards that count as 0 and as 1."""
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
        """One that knows nothing yet."""
        return ValueTracker(
            rho_min=self.rho_min, rho_max=self.rho_max, kl_half_life=self.kl_half_life
        )

    def build(self) -> "SPOObjective":
        """Build the objective."""
        return SPOObjective(self)


class SPOObjective(CriticFreeObjective):
    """Tracker and memory are the same on all processes: each hears of everybody's answers."""

    def __init__(self, config: SPO):
        super().__init__(config)
        self.config = config
        self.tracker = config.new_tracker()
        self.response_cache = ResponseCache()

    def compute_advantages(
        self, policy: LM, prompts: list[Prompt], rows: RolloutBatch
    ) -> RolloutBatch:
        """Advantages before the tracker is told."""
        self.tracker, self.response_cache = (
            self.tracker.copy(),
            self.response_cache.copy(),
        )  # `mark` has the old
        self._begin(policy, prompts)
        numbers = [prompt.prompt_id for prompt in prompts]
        rewards = self.normalize_rewards(rows.rewards)
        expected = torch.tensor([self.tracker.value(number) for number in numbers])
        advantages = torch.nan_to_num(rewards - expected.to(rewards))
        learned = rows.mask.any(1)
        if self.config.whiten:
            advantages = whiten(advantages, learned, self.peers)
        self._learn(numbers, rewards, self.distances(policy, numbers), rows)
        return rows._replace(advantages=expand_advantages(advantages, rows.mask))

    def normalize_rewards(self, rewards: Tensor) -> Tensor:
        """Rewards between 0 and 1; NaN stays NaN."""
        config = self.config
        return ((rewards - config.reward_min) / (config.reward_max - config.reward_min)).clamp(0, 1)

    def distances(self, policy: LM, numbers: list[int]) -> Tensor:
        """(P,) how far the policy has moved on its last answer to each prompt; 0 where there is
        none.
        """
        found = torch.zeros(len(numbers), dtype=torch.float64)
        known = [place for place, number in enumerate(numbers) if number in self.response_cache]
        if known:
            device = policy.embed.weight.device
            rows = self.response_cache.get_batch([numbers[place] for place in known], device)
            with eval_mode(policy), torch.no_grad():
                now = self.logprobs(policy, rows)[0]
            moved = row_sums((now - rows.old_logprobs).abs(), rows.mask) / rows.mask.sum(1).clamp(
                min=1
            )
            found[known] = moved.double().cpu()
        return found

    def _begin(self, policy: LM, prompts: list[Prompt]) -> None:
        """Answer prompts that were never met, for what may be expected of them."""
        count = self.config.warmup_samples
        if not count:
            return
        new = [prompt for prompt in prompts if prompt.prompt_id not in self.tracker.state]
        seeds = [
            derive_seed(self.config.seed, "first", prompt.prompt_id, i)
            for prompt in new
            for i in range(count)
        ]
        requested = [prompt for prompt in new for _ in range(count)]
        rewards = self.normalize_rewards(
            self.score(requested, self.generate(policy, requested, seeds))
        )
        reported = {
            "numbers": torch.tensor([prompt.prompt_id for prompt in new]),
            "rewards": rewards,
        }
        for part in self.peers.gather(reported):
            earned = part["rewards"].view(-1, count).tolist()
            for number, values in zip(part["numbers"].tolist(), earned, strict=True):
                self.tracker.init_prompt(int(number), [v for v in values if math.isfinite(v)])

    def _learn(
        self, numbers: list[int], rewards: Tensor, distances: Tensor, rows: RolloutBatch
    ) -> None:
        """Tracker and memory take in the answers of all processes, in the order of ranks."""
        own = {"numbers": torch.tensor(numbers), "earned": rewards, "moved": distances}
        for part in self.peers.gather(own | rows._asdict()):
            given = RolloutBatch(**{name: part[name] for name in RolloutBatch._fields})
            whose = part["numbers"].tolist()
            self.response_cache.store(whose, given)
            reported = zip(whose, part["earned"].tolist(), part["moved"].tolist(), strict=True)
            for number, reward, distance in reported:
                if math.isfinite(reward):
                    self.tracker.update(number, reward, distance)

    def snapshot(self) -> Any:
        """Rollout and place, tracker and memory."""
        return super().snapshot(), self.tracker, self.response_cache

    def restore_snapshot(self, snapshot: Any) -> None:
        """Stand where `mark` was taken."""
        rollout, self.tracker, self.response_cache = snapshot
        super().restore_snapshot(rollout)

    def rank_state(self) -> dict[str, Tensor]:
        """Also tracker and memory."""
        return (
            super().rank_state()
            | _named("tracker.", self.tracker.state_dict())
            | _named("memory.", self.response_cache.state_dict())
        )

    def load_rank_state(self, saved: dict[str, Tensor]) -> None:
        """Put back what `carried` gave."""
        tracker, memory = _part("tracker.", saved), _part("memory.", saved)
        self.tracker.load_state_dict(tracker)
        self.response_cache = ResponseCache.from_state_dict(memory)
        super().load_rank_state(_rest(saved))

    def reshard_rank_state(
        self, parts: list[dict[str, Tensor]], rank: int, world_size: int
    ) -> dict[str, Tensor]:
        """A share of the rows; what is remembered is the same everywhere."""
        kept = {name: part for name, part in parts[0].items() if "." in name}
        return super().reshard_rank_state([_rest(part) for part in parts], rank, world_size) | kept


def _named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _part(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    chosen = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor for name, tensor in chosen.items()}


def _rest(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "." not in name}

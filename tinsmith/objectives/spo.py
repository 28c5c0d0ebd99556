"""Single-stream Policy Optimization (2509.13232): one answer to each prompt, judged against what
that prompt is expected to earn.

    A = r - value(prompt), before the tracker takes r in; then (A - mean) / (std + 1e-8)

over the rollouts of all processes. How far the policy has moved since it last answered a prompt is
the mean |ln pi - ln pi_then| over the tokens of that answer, measured when the prompt comes again.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tinsmith.core.rng import derive
from tinsmith.data.prompts import Prompt
from tinsmith.infer.generate import evaluating
from tinsmith.nn.model import LM
from tinsmith.objectives.grpo import Clipped, ClippedPolicy
from tinsmith.objectives.logprobs import row_sums
from tinsmith.objectives.memory import Memory
from tinsmith.objectives.ratio import per_token
from tinsmith.objectives.rollout import Rollout
from tinsmith.objectives.tracker import Tracker
from tinsmith.objectives.whiten import whitened

__all__ = ["SPO", "SingleStream", "Tracker"]


@dataclass(frozen=True, kw_only=True)
class SPO(Clipped):
    """One answer to each prompt, and a tracker of what every prompt is expected to earn."""

    kind: Literal["spo"] = "spo"
    rho_min: float = 0.875
    rho_max: float = 0.96
    half: float = 0.06
    """The distance, in nats per token, after which half of what is known counts."""
    first_answers: int = 0
    """Answers to a prompt that is met for the first time, for its tracker to begin with; nothing
    is learned from them.
    """
    lowest: float = 0.0
    highest: float = 1.0
    """The rewards that count as 0 and as 1."""
    whiten: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answers != 1:
            raise ValueError(f"answers={self.answers} must be 1: spo has a single stream")
        if self.first_answers < 0:
            raise ValueError(f"first_answers={self.first_answers} must be at least 0")
        if not self.lowest < self.highest:
            raise ValueError(f"lowest={self.lowest} must be below highest={self.highest}")
        self.tracker()

    def tracker(self) -> Tracker:
        """One that knows nothing yet."""
        return Tracker(rho_min=self.rho_min, rho_max=self.rho_max, half=self.half)

    def build(self) -> "SingleStream":
        """The objective."""
        return SingleStream(self)


class SingleStream(ClippedPolicy):
    """Tracker and memory are the same on all processes: each hears of everybody's answers."""

    def __init__(self, config: SPO):
        super().__init__(config)
        self.config = config
        self.tracker = config.tracker()
        self.memory = Memory()

    def judged(self, policy: LM, prompts: list[Prompt], rows: Rollout) -> Rollout:
        """Advantages before the tracker is told."""
        self.tracker, self.memory = self.tracker.copy(), self.memory.copy()  # `mark` has the old
        self._begin(policy, prompts)
        numbers = [prompt.number for prompt in prompts]
        rewards = self.normalised(rows.rewards)
        expected = torch.tensor([self.tracker.value(number) for number in numbers])
        advantages = torch.nan_to_num(rewards - expected.to(rewards))
        learned = rows.mask.any(1)
        if self.config.whiten:
            advantages = whitened(advantages, learned, self.peers)
        self._learn(numbers, rewards, self.distances(policy, numbers), rows)
        return rows._replace(advantages=per_token(advantages, rows.mask))

    def normalised(self, rewards: Tensor) -> Tensor:
        """Rewards between 0 and 1; NaN stays NaN."""
        config = self.config
        return ((rewards - config.lowest) / (config.highest - config.lowest)).clamp(0, 1)

    def distances(self, policy: LM, numbers: list[int]) -> Tensor:
        """(P,) how far the policy has moved on its last answer to each prompt; 0 where there is
        none.
        """
        found = torch.zeros(len(numbers), dtype=torch.float64)
        known = [place for place, number in enumerate(numbers) if number in self.memory]
        if known:
            device = policy.embed.weight.device
            rows = self.memory.rows([numbers[place] for place in known], device)
            with evaluating(policy), torch.no_grad():
                now = self.logprobs(policy, rows)[0]
            moved = row_sums((now - rows.old).abs(), rows.mask) / rows.mask.sum(1).clamp(min=1)
            found[known] = moved.double().cpu()
        return found

    def _begin(self, policy: LM, prompts: list[Prompt]) -> None:
        """Answer prompts that were never met, for what may be expected of them."""
        count = self.config.first_answers
        if not count:
            return
        new = [prompt for prompt in prompts if prompt.number not in self.tracker.state]
        seeds = [
            derive(self.config.seed, "first", prompt.number, i)
            for prompt in new
            for i in range(count)
        ]
        asked = [prompt for prompt in new for _ in range(count)]
        rewards = self.normalised(self.rewards(asked, self.answers(policy, asked, seeds)))
        told = {"numbers": torch.tensor([prompt.number for prompt in new]), "rewards": rewards}
        for part in self.peers.gather(told):
            earned = part["rewards"].view(-1, count).tolist()
            for number, values in zip(part["numbers"].tolist(), earned, strict=True):
                self.tracker.begin(int(number), [v for v in values if math.isfinite(v)])

    def _learn(self, numbers: list[int], rewards: Tensor, distances: Tensor, rows: Rollout) -> None:
        """Tracker and memory take in the answers of all processes, in the order of ranks."""
        own = {"numbers": torch.tensor(numbers), "earned": rewards, "moved": distances}
        for part in self.peers.gather(own | rows._asdict()):
            given = Rollout(**{name: part[name] for name in Rollout._fields})
            whose = part["numbers"].tolist()
            self.memory.keep(whose, given)
            told = zip(whose, part["earned"].tolist(), part["moved"].tolist(), strict=True)
            for number, reward, distance in told:
                if math.isfinite(reward):
                    self.tracker.update(number, reward, distance)

    def mark(self) -> Any:
        """Rollout and place, tracker and memory."""
        return super().mark(), self.tracker, self.memory

    def rewind(self, mark: Any) -> None:
        """Stand where `mark` was taken."""
        rollout, self.tracker, self.memory = mark
        super().rewind(rollout)

    def carried(self) -> dict[str, Tensor]:
        """Also tracker and memory."""
        return (
            super().carried()
            | _named("tracker.", self.tracker.saved())
            | _named("memory.", self.memory.saved())
        )

    def restore_carried(self, saved: dict[str, Tensor]) -> None:
        """Put back what `carried` gave."""
        tracker, memory = _part("tracker.", saved), _part("memory.", saved)
        self.tracker.load(tracker)
        self.memory = Memory.loaded(memory)
        super().restore_carried(_rest(saved))

    def shared_out(
        self, parts: list[dict[str, Tensor]], rank: int, world: int
    ) -> dict[str, Tensor]:
        """A share of the rows; what is remembered is the same everywhere."""
        kept = {name: part for name, part in parts[0].items() if "." in name}
        return super().shared_out([_rest(part) for part in parts], rank, world) | kept


def _named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _part(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    chosen = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor for name, tensor in chosen.items()}


def _rest(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "." not in name}

"""Learning from one's own answers: what all such objectives have in common.

    prompts -> answers -> rewards -> advantages -> `updates` passes over `minibatches` parts

A rollout takes `train.batch_size` prompts over all processes, `answers` times each. Its parts are
the micro-batches of the trainer: with `train.grad_accum_steps` equal to `minibatches`, a pass is
one optimizer step. Part k has every `minibatches`-th prompt, whole groups, so that parts are the
same however many processes there are. The rollout in hand and the place in it are saved with the
run.

The policy has no dropout and no router noise (`still.py`), so at the first step after a rollout the
new policy is the old one: every ratio is 1.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tinsmith.core.errors import UserError
from tinsmith.core.log import print_warning
from tinsmith.core.parse import Count
from tinsmith.core.rng import derive_seed
from tinsmith.data.formats import FormatName
from tinsmith.data.formats.prompts import Prompt
from tinsmith.data.loader.batch import Batch
from tinsmith.infer.completions import eos_ids
from tinsmith.losses.logprobs import target_logprobs
from tinsmith.nn.model import LM, ModelOut
from tinsmith.objectives.base import Objective, ObjectiveConfigBase, RankLoader, SampleSource
from tinsmith.objectives.frozen import check_deterministic, reference_model
from tinsmith.objectives.rl.rollout import (
    GenerationLimits,
    Rollout,
    RolloutBatch,
    ToolRunner,
    collate,
    concat_rollouts,
    generate_rollouts,
)
from tinsmith.rewards.config import ExactMatchReward, RewardConfig, RewardModelReward
from tinsmith.rewards.functions import Response, score_responses
from tinsmith.text.tokenizer import Tokenizer
from tinsmith.text.tools import ToolName


@dataclass(frozen=True, kw_only=True)
class RLConfig(ObjectiveConfigBase):
    """What every objective of this kind can be told."""

    data_format: ClassVar[FormatName] = "prompts"
    generates: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True
    rewards: tuple[RewardConfig, ...] = (ExactMatchReward(),)
    """What answers are judged by; the reward is their weighted sum."""
    num_generations: Count = 1
    """Answers to one prompt."""
    max_new_tokens: Count = 256
    """Tokens of an answer, at most."""
    temperature: float = 1.0
    """Of sampling, and of every log-probability here."""
    generation_batch_size: Count = 64
    """Answers that are made at the same time, by one process."""
    num_minibatches: Count = 1
    """Parts that a rollout is trained in."""
    num_epochs: Count = 1
    """Passes over a rollout."""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the policy before its first step; 0 needs no copy of it."""
    mask_truncated: bool = False
    """Whether answers that were cut off at `max_new_tokens` are learned from."""
    truncation_penalty: float = 0.0
    """What is taken from the reward of an answer that was cut off."""
    tools: tuple[ToolName, ...] = ()
    """What the policy may call; the data must tell it how."""
    max_turns: Count = 3
    """Answers of an episode with tools, at most."""
    seed: int = 0
    """Random seed of sampling."""

    def __post_init__(self) -> None:
        for name in (
            "num_generations",
            "max_new_tokens",
            "generation_batch_size",
            "num_minibatches",
            "num_epochs",
            "max_turns",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.rewards:
            raise ValueError("rewards must name at least one")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")
        if not self.kl_coef >= 0:
            raise ValueError(f"kl_coef={self.kl_coef} must be at least 0")

    @property
    def max_response_tokens(self) -> int:
        """Tokens that the policy may say in an episode, at most."""
        return self.max_new_tokens * (self.max_turns if self.tools else 1)

    def frozen_models(self) -> dict[str, str | None]:
        """The reference, where anything is compared with it."""
        return {"reference": None} if self.kl_coef > 0 else {}

    def check_rank_batch(self, num_prompts: int) -> None:
        """Parts of a rollout are equal."""
        if num_prompts % self.num_minibatches:
            raise UserError(
                f"objective.num_minibatches: {self.num_minibatches} must divide the {num_prompts} "
                "prompts of a "
                "process (train.batch_size over the processes)"
            )

    def reward_models(self) -> tuple[str, ...]:
        """Those among the rewards."""
        return tuple(each.path for each in self.rewards if isinstance(each, RewardModelReward))


class RLObjective(Objective):
    """Rolls out, scores, and gives the parts of a rollout as batches; what is learned from them is
    the business of subclasses.
    """

    def __init__(self, config: RLConfig):
        super().__init__()
        self.config = config
        self.rollout: RolloutBatch | None = None
        self.minibatch_index = 0
        """Parts of `rollout` that were given, over all passes."""

    def prepare(self, policy: LM, tokenizer: Tokenizer) -> None:
        """Rewards read text, and answers have an end; the policy must be still."""
        check_deterministic(policy)
        self.tokenizer = tokenizer
        self.weighted_rewards = [
            each.build_weighted(self.reward_models) for each in self.config.rewards
        ]
        tools = self.config.tools
        self.reply = ToolRunner(tokenizer, tools, self.config.max_turns).reply if tools else None
        self.limits = GenerationLimits(
            max_new_tokens=self.config.max_new_tokens,
            max_seq_len=policy.config.max_seq_len,
            batch_size=self.config.generation_batch_size,
            temperature=self.config.temperature,
            eos_ids=eos_ids(tokenizer),
        )

    def batches(self, loader: RankLoader, policy: LM) -> Iterator[Any]:
        """Parts of rollouts, endlessly.

        UserError where prompts do not come out even.
        """
        parts, total = (
            self.config.num_minibatches,
            self.config.num_minibatches * self.config.num_epochs,
        )
        self.config.check_rank_batch(loader.rank_batch_size)
        while True:
            if self.rollout is None or self.minibatch_index >= total:
                self.rollout, self.minibatch_index = self.next_rollout(loader, policy), 0
            part = self.minibatch_index % parts
            self.minibatch_index += 1
            yield self.rollout.select_rows(self._part(part, loader.rank_batch_size))

    def _part(self, part: int, prompts: int) -> Tensor:
        """The rows of part number `part`: whole groups."""
        answers = self.config.num_generations
        chosen = torch.arange(part, prompts, self.config.num_minibatches)
        return (chosen[:, None] * answers + torch.arange(answers)).flatten()

    def next_rollout(self, loader: RankLoader, policy: LM) -> RolloutBatch:
        """The next rollout, scored and judged."""
        first = loader.cursor + loader.offset
        prompts = loader.next_prompts()
        repeated = [prompt for prompt in prompts for _ in range(self.config.num_generations)]
        seeds = [
            derive_seed(self.config.seed, "answer", first + place, number)
            for place in range(len(prompts))
            for number in range(self.config.num_generations)
        ]
        rows = self.generate_and_score(policy, repeated, seeds)
        if self.config.frozen_models():
            with reference_model(policy, self.frozen_models.get("reference")) as lm:
                rows = rows._replace(ref_logprobs=self.logprobs(lm, rows)[0])
        return self.with_advantages(policy, prompts, rows)

    def generate_and_score(
        self, policy: LM, prompts: list[Prompt], seeds: list[int]
    ) -> RolloutBatch:
        """An answer to each prompt, and its reward. Answers without one are learned nothing
        from.
        """
        episodes = self.generate(policy, prompts, seeds)
        rows = collate(episodes, policy.embed.weight.device)
        rewards = self.compute_rewards(prompts, episodes).to(rows.old_logprobs)
        learned = torch.isfinite(rewards)
        if self.config.mask_truncated:
            learned = learned & ~rows.truncated
        return rows._replace(rewards=rewards, mask=rows.mask & learned[:, None])

    def generate(
        self,
        policy: LM,
        prompts: list[Prompt],
        seeds: list[int],
        limits: GenerationLimits | None = None,
    ) -> list[Rollout]:
        """One answer to each prompt."""
        requested, drawn = [prompt.ids for prompt in prompts], limits or self.limits
        return generate_rollouts(
            policy, requested, seeds, drawn, reply=self.reply, poll=self.peers.poll
        )

    def compute_rewards(self, prompts: list[Prompt], episodes: list[Rollout]) -> Tensor:
        """(B,) the reward of each answer, less the penalty; NaN where it has none."""
        cut = torch.tensor([episode.finish_reason != "stop" for episode in episodes])
        given = torch.tensor(self.score(prompts, episodes))
        return torch.where(
            torch.isfinite(given), given - self.config.truncation_penalty * cut, math.nan
        )

    def score(self, prompts: list[Prompt], episodes: list[Rollout]) -> list[float]:
        """The reward of each answer; NaN, and a word about it, where it has none."""
        answers = [
            Response(prompt, self.tokenizer.decode(self.response_ids(episode)), episode.ids)
            for prompt, episode in zip(prompts, episodes, strict=True)
        ]
        scored = score_responses(self.weighted_rewards, answers)
        for failure in scored.failures:
            scored.rewards[failure.response_index] = math.nan
            print_warning(
                f"no reward: {failure.reward_name} of prompt {failure.prompt_id}: {failure.reason}"
            )
        return scored.rewards

    def response_ids(self, episode: Rollout) -> list[int]:
        """What was said last, without its end."""
        newest = episode.last_turn_ids
        return newest[:-1] if newest and newest[-1] in self.limits.eos_ids else newest

    def with_advantages(
        self, policy: LM, prompts: list[Prompt], rows: RolloutBatch
    ) -> RolloutBatch:
        """The rollout with its advantages, and whatever else the loss wants."""
        raise NotImplementedError

    def dummy_batch(self, batch: Batch) -> RolloutBatch:
        """One group, of answers that are all the same."""
        answers = self.config.num_generations
        rows = [Rollout([*row.tolist()], seed=0) for row in batch.ids.repeat(answers, 1)]
        for row in rows:
            row.response_mask = [False] + [True] * (len(row.ids) - 1)
        return collate(rows, batch.ids.device)

    def evaluate(self, policy: LM, source: SampleSource, max_samples: int) -> dict[str, float]:
        """Greedy answers to held-back prompts, spread evenly over them."""
        count = min(max_samples, source.size)
        prompts = [source.get_prompts(i * source.size // count, 1)[0] for i in range(count)]
        greedy = replace(self.limits, temperature=0.0)
        episodes = self.generate(policy, prompts, [0] * count, greedy)
        rewards = self.compute_rewards(prompts, episodes)
        output = sum(sum(episode.response_mask) for episode in episodes)
        cut = sum(episode.finish_reason != "stop" for episode in episodes)
        reward = float(rewards.nanmean())
        reported = {
            "reward": reward,
            "completion_length": output / count,
            "truncated_fraction": cut / count,
        }
        if self.config.tools:
            reported["turns"] = sum(episode.turns for episode in episodes) / count
        return reported | {"loss": -reward}

    def logprobs(self, lm: LM, rows: RolloutBatch) -> tuple[Tensor, ModelOut]:
        """(B, T) log-probabilities of what was said, at the sampling temperature, and what the
        model said beside.
        """
        out = lm(rows.ids, segments=rows.segments, logits=False)
        output = target_logprobs(
            out.hidden, rows.targets, rows.mask, lm.head, self.config.temperature
        )
        return output, out

    def state(self) -> dict[str, object]:
        """The place in the rollout."""
        return {"place": self.minibatch_index}

    def load_state(self, saved: dict[str, Any]) -> None:
        """Put back what `progress` gave."""
        self.minibatch_index = saved["place"]

    def snapshot(self) -> Any:
        """Rollout and place."""
        return self.rollout, self.minibatch_index

    def restore_snapshot(self, snapshot: Any) -> None:
        """Stand where `mark` was taken."""
        self.rollout, self.minibatch_index = snapshot

    def rank_state(self) -> dict[str, Tensor]:
        """The rollout in hand, if some of it is still to be given."""
        over = self.minibatch_index >= self.config.num_minibatches * self.config.num_epochs
        return {} if self.rollout is None or over else self.rollout._asdict()

    def load_rank_state(self, saved: dict[str, Tensor]) -> None:
        """Put back what `carried` gave."""
        self.rollout = RolloutBatch(**saved) if saved else None

    def reshard_rank_state(
        self, parts: list[dict[str, Tensor]], rank: int, world_size: int
    ) -> dict[str, Tensor]:
        """An equal share of the rows of all, in their order."""
        if not parts[0]:
            return {}
        whole = concat_rollouts([RolloutBatch(**part) for part in parts])
        share = len(whole.ids) // world_size
        return whole.select_rows(torch.arange(rank * share, (rank + 1) * share))._asdict()

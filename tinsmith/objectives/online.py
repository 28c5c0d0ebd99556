"""Learning from one's own answers: what all such objectives have in common.

    prompts -> answers -> rewards -> advantages -> `updates` passes over `minibatches` parts

A rollout takes `train.rows` prompts over all processes, `answers` times each. Its parts are the
micro-batches of the trainer: with `train.accumulate` equal to `minibatches`, a pass is one
optimizer step. Part k has every `minibatches`-th prompt, whole groups, so that parts are the same
however many processes there are. The rollout in hand and the place in it are saved with the run.

The policy has no dropout and no router noise (`still.py`), so at the first step after a rollout the
new policy is the old one: every ratio is 1.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tinsmith.core.errors import UserError
from tinsmith.core.log import warn
from tinsmith.core.parse import Count
from tinsmith.core.rng import derive
from tinsmith.data.batch import Batch
from tinsmith.data.config import Shape
from tinsmith.data.prompts import Prompt
from tinsmith.infer.generate import ends
from tinsmith.nn.model import LM, ModelOut
from tinsmith.objectives.base import Feed, Objective, ObjectiveConfigBase, Source
from tinsmith.objectives.logprobs import chosen_logprobs
from tinsmith.objectives.reference import reference
from tinsmith.objectives.rewards import Answer, judge
from tinsmith.objectives.rollout import Episode, Limits, Rollout, collate, join, roll_out
from tinsmith.objectives.rules import Exact, Learned, RewardConfig
from tinsmith.objectives.still import check_still
from tinsmith.objectives.tools import ToolName, Tools
from tinsmith.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Online(ObjectiveConfigBase):
    """What every objective of this kind can be told."""

    shape: ClassVar[Shape] = "prompts"
    answers_itself: ClassVar[bool] = True
    still: ClassVar[bool] = True
    rewards: tuple[RewardConfig, ...] = (Exact(),)
    """What answers are judged by; the reward is their weighted sum."""
    answers: Count = 1
    """Answers to one prompt."""
    max_new: Count = 256
    """Tokens of an answer, at most."""
    temperature: float = 1.0
    """Of sampling, and of every log-probability here."""
    decode_rows: Count = 64
    """Answers that are made at the same time, by one process."""
    minibatches: Count = 1
    """Parts that a rollout is trained in."""
    updates: Count = 1
    """Passes over a rollout."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    """The ratio to the policy that gave the answer is held in [1 - clip_low, 1 + clip_high]."""
    beta: float = 0.0
    """Weight of the KL divergence from the policy before its first step; 0 needs no copy of it."""
    truncated: Literal["keep", "drop"] = "keep"
    """Whether answers that were cut off at `max_new` are learned from."""
    penalty: float = 0.0
    """What is taken from the reward of an answer that was cut off."""
    tools: tuple[ToolName, ...] = ()
    """What the policy may call; the data must tell it how."""
    turns: Count = 3
    """Answers of an episode with tools, at most."""
    seed: int = 0
    """Of sampling."""

    def __post_init__(self) -> None:
        for name in ("answers", "max_new", "decode_rows", "minibatches", "updates", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.rewards:
            raise ValueError("rewards must name at least one")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low={self.clip_low} must be from 0 to 1")
        for name in ("clip_high", "beta"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")

    @property
    def longest(self) -> int:
        """Tokens that the policy may say in an episode, at most."""
        return self.max_new * (self.turns if self.tools else 1)

    def judges(self) -> dict[str, str | None]:
        """The reference, where anything is compared with it."""
        return {"reference": None} if self.beta > 0 else {}

    def check_share(self, prompts: int) -> None:
        """Parts of a rollout are equal."""
        if prompts % self.minibatches:
            raise UserError(
                f"objective.minibatches: {self.minibatches} must divide the {prompts} prompts of a "
                "process (train.rows over the processes)"
            )

    def reward_models(self) -> tuple[str, ...]:
        """Those among the rewards."""
        return tuple(each.path for each in self.rewards if isinstance(each, Learned))


class OnlineObjective(Objective):
    """Rolls out, scores, and gives the parts of a rollout as batches; what is learned from them is
    the business of subclasses.
    """

    def __init__(self, config: Online):
        super().__init__()
        self.config = config
        self.rollout: Rollout | None = None
        self.place = 0
        """Parts of `rollout` that were given, over all passes."""

    def prepare(self, policy: LM, tokenizer: Tokenizer) -> None:
        """Rewards read text, and answers have an end; the policy must be still."""
        check_still(policy)
        self.tokenizer = tokenizer
        self.rules = [each.rule(self.scorers) for each in self.config.rewards]
        tools = self.config.tools
        self.reply = Tools(tokenizer, tools, self.config.turns).reply if tools else None
        self.limits = Limits(
            max_new=self.config.max_new,
            context=policy.config.max_context,
            rows=self.config.decode_rows,
            temperature=self.config.temperature,
            stops=ends(tokenizer),
        )

    def batches(self, feed: Feed, policy: LM) -> Iterator[Any]:
        """Parts of rollouts, endlessly.

        UserError where prompts do not come out even.
        """
        parts, total = self.config.minibatches, self.config.minibatches * self.config.updates
        self.config.check_share(feed.share)
        while True:
            if self.rollout is None or self.place >= total:
                self.rollout, self.place = self.fresh(feed, policy), 0
            part = self.place % parts
            self.place += 1
            yield self.rollout.rows(self._part(part, feed.share))

    def _part(self, part: int, prompts: int) -> Tensor:
        """The rows of part number `part`: whole groups."""
        answers = self.config.answers
        chosen = torch.arange(part, prompts, self.config.minibatches)
        return (chosen[:, None] * answers + torch.arange(answers)).flatten()

    def fresh(self, feed: Feed, policy: LM) -> Rollout:
        """The next rollout, scored and judged."""
        first = feed.cursor + feed.offset
        prompts = feed.prompts()
        repeated = [prompt for prompt in prompts for _ in range(self.config.answers)]
        seeds = [
            derive(self.config.seed, "answer", first + place, number)
            for place in range(len(prompts))
            for number in range(self.config.answers)
        ]
        rows = self.scored(policy, repeated, seeds)
        if self.config.judges():
            with reference(policy, self.frozen.get("reference")) as lm:
                rows = rows._replace(reference=self.logprobs(lm, rows)[0])
        return self.judged(policy, prompts, rows)

    def scored(self, policy: LM, prompts: list[Prompt], seeds: list[int]) -> Rollout:
        """An answer to each prompt, and its reward. Answers without one are learned nothing
        from.
        """
        episodes = self.answers(policy, prompts, seeds)
        rows = collate(episodes, policy.embed.weight.device)
        rewards = self.rewards(prompts, episodes).to(rows.old)
        learned = torch.isfinite(rewards)
        if self.config.truncated == "drop":
            learned = learned & ~rows.truncated
        return rows._replace(rewards=rewards, mask=rows.mask & learned[:, None])

    def answers(
        self, policy: LM, prompts: list[Prompt], seeds: list[int], limits: Limits | None = None
    ) -> list[Episode]:
        """One answer to each prompt."""
        asked, drawn = [prompt.ids for prompt in prompts], limits or self.limits
        return roll_out(policy, asked, seeds, drawn, reply=self.reply, poll=self.peers.poll)

    def rewards(self, prompts: list[Prompt], episodes: list[Episode]) -> Tensor:
        """(B,) the reward of each answer, less the penalty; NaN where it has none."""
        cut = torch.tensor([episode.finish != "stop" for episode in episodes])
        given = torch.tensor(self.score(prompts, episodes))
        return torch.where(torch.isfinite(given), given - self.config.penalty * cut, math.nan)

    def score(self, prompts: list[Prompt], episodes: list[Episode]) -> list[float]:
        """The reward of each answer; NaN, and a word about it, where it has none."""
        answers = [
            Answer(prompt, self.tokenizer.decode(self.words(episode)), episode.ids)
            for prompt, episode in zip(prompts, episodes, strict=True)
        ]
        judged = judge(self.rules, answers)
        for failure in judged.failures:
            judged.rewards[failure.place] = math.nan
            warn(f"no reward: {failure.rule} of prompt {failure.number}: {failure.reason}")
        return judged.rewards

    def words(self, episode: Episode) -> list[int]:
        """What was said last, without its end."""
        newest = episode.newest
        return newest[:-1] if newest and newest[-1] in self.limits.stops else newest

    def judged(self, policy: LM, prompts: list[Prompt], rows: Rollout) -> Rollout:
        """The rollout with its advantages, and whatever else the loss wants."""
        raise NotImplementedError

    def example(self, batch: Batch) -> Rollout:
        """One group, of answers that are all the same."""
        answers = self.config.answers
        rows = [Episode([*row.tolist()], seed=0) for row in batch.ids.repeat(answers, 1)]
        for row in rows:
            row.said = [False] + [True] * (len(row.ids) - 1)
        return collate(rows, batch.ids.device)

    def examine(self, policy: LM, source: Source, rows: int) -> dict[str, float]:
        """Greedy answers to held-back prompts, spread evenly over them."""
        count = min(rows, source.size)
        prompts = [source.prompts(i * source.size // count, 1)[0] for i in range(count)]
        greedy = replace(self.limits, temperature=0.0)
        episodes = self.answers(policy, prompts, [0] * count, greedy)
        rewards = self.rewards(prompts, episodes)
        said = sum(sum(episode.said) for episode in episodes)
        cut = sum(episode.finish != "stop" for episode in episodes)
        reward = float(rewards.nanmean())
        told = {"reward": reward, "length": said / count, "truncated": cut / count}
        if self.config.tools:
            told["turns"] = sum(episode.turns for episode in episodes) / count
        return told | {"loss": -reward}

    def logprobs(self, lm: LM, rows: Rollout) -> tuple[Tensor, ModelOut]:
        """(B, T) log-probabilities of what was said, at the sampling temperature, and what the
        model said beside.
        """
        out = lm(rows.ids, segments=rows.segments, logits=False)
        said = chosen_logprobs(
            out.hidden, rows.targets, rows.mask, lm.head, self.config.temperature
        )
        return said, out

    def progress(self) -> dict[str, object]:
        """The place in the rollout."""
        return {"place": self.place}

    def restore_progress(self, saved: dict[str, Any]) -> None:
        """Put back what `progress` gave."""
        self.place = saved["place"]

    def mark(self) -> Any:
        """Rollout and place."""
        return self.rollout, self.place

    def rewind(self, mark: Any) -> None:
        """Stand where `mark` was taken."""
        self.rollout, self.place = mark

    def carried(self) -> dict[str, Tensor]:
        """The rollout in hand, if some of it is still to be given."""
        over = self.place >= self.config.minibatches * self.config.updates
        return {} if self.rollout is None or over else self.rollout._asdict()

    def restore_carried(self, saved: dict[str, Tensor]) -> None:
        """Put back what `carried` gave."""
        self.rollout = Rollout(**saved) if saved else None

    def shared_out(
        self, parts: list[dict[str, Tensor]], rank: int, world: int
    ) -> dict[str, Tensor]:
        """An equal share of the rows of all, in their order."""
        if not parts[0]:
            return {}
        whole = join([Rollout(**part) for part in parts])
        share = len(whole.ids) // world
        return whole.rows(torch.arange(rank * share, (rank + 1) * share))._asdict()

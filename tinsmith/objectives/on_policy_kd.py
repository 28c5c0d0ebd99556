"""On-policy distillation: the student answers, and a teacher says how it would have gone on.

    loss = mean over tokens t of an answer y of D(teacher(. | x', y < t), student(. | x, y < t))

with D the generalised Jensen-Shannon divergence (GKD: Agarwal et al., 2306.13649, algorithm 1).
Answers are the student's own, without a gradient through sampling, in a share of batches that may
grow while training goes on; in the others they are those of the data. The teacher may be told more
than the student (`hint`): it reads a prompt of its own before the same answer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from tinsmith.core.parse import Config, Count
from tinsmith.core.rng import derive
from tinsmith.data.batch import Batch
from tinsmith.data.config import Shape
from tinsmith.data.prompts import Prompt, read_prompt
from tinsmith.infer.generate import ends, evaluating
from tinsmith.nn.model import LM
from tinsmith.nn.quant import Weights
from tinsmith.objectives.base import (
    Feed,
    Loss,
    Metric,
    Objective,
    ObjectiveConfigBase,
    Source,
    aux_metrics,
    with_aux,
)
from tinsmith.objectives.divergence import Mix, Told, summed_divergence
from tinsmith.objectives.kd import check_divergence
from tinsmith.objectives.rollout import Episode, Limits, Rollout, collate, roll_out
from tinsmith.text.chat import Message, encode_chat, encode_prompt
from tinsmith.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Ramp(Config):
    """The share of batches, counted from 0, whose answers are the student's own: `begin` for the
    first `after`, then in a line to `end` over the next `over`.
    """

    begin: float = 1.0
    end: float = 1.0
    after: Count = 0
    over: Count = 0

    def __post_init__(self) -> None:
        for name in ("begin", "end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1")
        for name in ("after", "over"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")

    def at(self, batch: int) -> float:
        """The share at batch number `batch`."""
        done = min(max(batch - self.after, 0) / self.over, 1) if self.over else batch >= self.after
        return self.begin + (self.end - self.begin) * done


@dataclass(frozen=True, kw_only=True)
class OnPolicyKD(ObjectiveConfigBase):
    """Answer, and learn what a teacher would have said."""

    kind: Literal["on_policy_kd"] = "on_policy_kd"
    shape: ClassVar[Shape] = "prompts"
    answers_itself: ClassVar[bool] = True
    teacher: str
    """A run, a checkpoint or a Hugging Face folder of the same vocabulary."""
    teacher_weights: Weights = "fp32"
    """How the teacher's weights are held in memory."""
    hint: str | None = None
    """What only the teacher is told, at the end of its system message; `{answer}` stands for the
    right answer."""
    beta: float = 0.5
    """0 is the forward KL, 1 the reverse."""
    temperature: float = 1.0
    """Of both distributions."""
    share: Ramp = Ramp()
    max_new: Count = 256
    """Tokens of an answer, at most."""
    sampling: float = 1.0
    """The temperature at which the student answers."""
    decode_rows: Count = 64
    """Answers that are made at the same time, by one process."""
    seed: int = 0
    """Of sampling."""

    def __post_init__(self) -> None:
        check_divergence(self.beta, self.temperature)
        for name in ("max_new", "decode_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.sampling > 0:
            raise ValueError(f"sampling={self.sampling} must be a number above 0")

    def judges(self) -> dict[str, str | None]:
        """The teacher."""
        return {"teacher": self.teacher}

    def judge_weights(self) -> Weights:
        """How the teacher's weights are held."""
        return self.teacher_weights

    def build(self) -> "OnPolicyDistillation":
        """The objective."""
        return OnPolicyDistillation(self)


class Answers(NamedTuple):
    """The same answers behind the student's prompts and behind the teacher's."""

    student: Rollout
    teacher: Rollout
    sampled: Tensor
    """(B,) bool: which answers are the student's."""

    def to(self, device: torch.device | str) -> "Answers":
        """The same on `device`."""
        student, teacher = self.student.to(device), self.teacher.to(device)
        return Answers(student, teacher, self.sampled.to(device))


class OnPolicyDistillation(Objective):
    """sum over answers' tokens of the divergence; the unit is a token of an answer. Nothing is
    remembered between batches: what is sampled depends on the weights and the place in the data.
    """

    def __init__(self, config: OnPolicyKD):
        super().__init__()
        self.config = config

    def prepare(self, policy: LM, tokenizer: Tokenizer) -> None:
        """Answers are text, and have an end."""
        self.tokenizer = tokenizer
        self.limits = Limits(
            max_new=self.config.max_new,
            context=policy.config.max_context,
            rows=self.config.decode_rows,
            temperature=self.config.sampling,
            stops=ends(tokenizer),
        )

    def batches(self, feed: Feed, policy: LM) -> Iterator[Any]:
        """Answers, endlessly."""
        while True:
            yield self.answered(feed, policy)

    def answered(self, feed: Feed, policy: LM) -> Answers:
        """The next prompts, answered by the student or by the data; by the student too where the
        data has no answer.
        """
        number, first = feed.cursor // feed.rows, feed.cursor + feed.offset
        prompts = feed.prompts()
        own = _chance(self.config.seed, number) < self.config.share.at(number)
        sampled = [own or prompt.answer is None for prompt in prompts]
        asked = [place for place, wanted in enumerate(sampled) if wanted]
        episodes = roll_out(
            policy,
            [prompts[place].ids for place in asked],
            [derive(self.config.seed, "answer", first + place) for place in asked],
            self.limits,
            poll=self.peers.poll,
        )
        said = {place: each.answer for place, each in zip(asked, episodes, strict=True)}
        answers = [said[i] if i in said else self.given(p) for i, p in enumerate(prompts)]
        return self.paired(prompts, answers, torch.tensor(sampled), policy.embed.weight.device)

    def example(self, batch: Batch) -> Answers:
        """The row as an answer to its first id, for both."""
        rows = [_episode(row[:1].tolist(), row[1:].tolist()) for row in batch.ids]
        both = collate(rows, batch.ids.device)
        return Answers(both, both, torch.ones(len(rows), dtype=torch.bool))

    def examine(self, policy: LM, source: Source, rows: int) -> dict[str, float]:
        """The divergence at greedy answers to held-back prompts, spread evenly over them."""
        count = min(rows, source.size)
        prompts = [source.prompts(i * source.size // count, 1)[0] for i in range(count)]
        asked, greedy = [prompt.ids for prompt in prompts], replace(self.limits, temperature=0.0)
        episodes = roll_out(policy, asked, [0] * count, greedy, poll=self.peers.poll)
        answers, sampled = [each.answer for each in episodes], torch.ones(count, dtype=torch.bool)
        example = self.paired(prompts, answers, sampled, policy.embed.weight.device)
        with torch.no_grad(), evaluating(policy):
            found = self.loss(policy, example).metrics["loss"]
        cut = sum(each.finish != "stop" for each in episodes) / count
        apart = float(found.total / found.count.clamp(min=1))
        return {"divergence": apart, "truncated": cut, "loss": apart}

    def given(self, prompt: Prompt) -> list[int]:
        """The answer of the data as ids, its end of turn included, at most `max_new`."""
        asked = read_prompt(prompt.record).asked
        answer = Message(role="assistant", content=prompt.answer or "")
        ids, mask = encode_chat(self.tokenizer, replace(asked, messages=(*asked.messages, answer)))
        end = max(place for place, said in enumerate(mask) if said) + 1
        return ids[len(prompt.ids) : end][: self.config.max_new]

    def paired(
        self,
        prompts: list[Prompt],
        answers: list[list[int]],
        sampled: Tensor,
        device: torch.device,
    ) -> Answers:
        """Rows for both; what of an answer does not fit behind both prompts is left out."""
        room = self.frozen["teacher"].config.max_context
        student, teacher = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            told = self.told(prompt)[-room:]
            kept = answer[: max(0, min(room - len(told), self.limits.context - len(prompt.ids)))]
            student.append(_episode(prompt.ids, kept))
            teacher.append(_episode(told, kept))
        return Answers(collate(student, device), collate(teacher, device), sampled.to(device))

    def told(self, prompt: Prompt) -> list[int]:
        """The teacher's prompt: the student's, or one with the hint."""
        if self.config.hint is None:
            return prompt.ids
        hint = self.config.hint.replace("{answer}", prompt.answer or "")
        asked = read_prompt(prompt.record).asked
        system = Message(role="system", content=hint)
        rest = asked.messages
        if rest[0].role == "system":
            system, rest = replace(rest[0], content=f"{rest[0].content}\n\n{hint}"), rest[1:]
        return encode_prompt(self.tokenizer, replace(asked, messages=(system, *rest)))

    def weight(self, batch: Any) -> Tensor:
        """Tokens of answers."""
        return batch.student.mask.sum()

    def loss(self, policy: LM, batch: Any) -> Loss:
        """The teacher's forward pass without gradients, the student's with them."""
        student, teacher, sampled = batch
        lm = self.frozen["teacher"]
        with torch.no_grad():
            taught = lm(teacher.ids, segments=teacher.segments, logits=False).hidden
        out = policy(student.ids, segments=student.segments, logits=False)
        targets = student.targets[student.mask]
        total, seen = summed_divergence(
            Told(out.hidden[student.mask], policy.head.weight),
            Told(taught[teacher.mask], lm.head.weight),
            targets,
            torch.ones_like(targets, dtype=torch.float32),
            Mix(self.config.beta, self.config.temperature),
        )
        tokens = self.weight(batch)
        rows = torch.tensor(len(sampled), device=sampled.device)
        metrics = {
            "loss": Metric(total.detach(), tokens),
            "nll": Metric(seen[1], tokens),
            "on_policy": Metric(sampled.sum(), rows),
            "length": Metric(tokens, rows),
        }
        total = with_aux(total, out.losses, tokens)
        return Loss(total, metrics | aux_metrics(out.losses, tokens), out.stats, out.probes)


def _chance(seed: int, batch: int) -> float:
    """A number in [0, 1) that all processes agree about."""
    return derive(seed, "batch", batch) % 2**32 / 2**32


def _episode(prompt: list[int], answer: list[int]) -> Episode:
    episode = Episode(list(prompt), seed=0)
    for token in answer:
        episode.say(token, 0.0)
    return episode

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
from tinsmith.core.rng import derive_seed
from tinsmith.data.formats import FormatName
from tinsmith.data.formats.prompts import Prompt, read_prompt
from tinsmith.data.loader.batch import Batch
from tinsmith.infer.completions import eos_ids
from tinsmith.infer.generate import eval_mode
from tinsmith.losses.divergence import DistillWeights, HeadInputs, summed_divergence
from tinsmith.nn.model import LM
from tinsmith.nn.quant import WeightDtype
from tinsmith.objectives.base import (
    Loss,
    Metric,
    Objective,
    ObjectiveConfigBase,
    RankLoader,
    SampleSource,
    add_aux_losses,
    aux_metrics,
)
from tinsmith.objectives.kd import check_divergence
from tinsmith.objectives.rl.rollout import (
    GenerationLimits,
    Rollout,
    RolloutBatch,
    collate,
    generate_rollouts,
)
from tinsmith.text.chat import Message, encode_chat, encode_prompt
from tinsmith.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class LinearRamp(Config):
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
    data_format: ClassVar[FormatName] = "prompts"
    generates: ClassVar[bool] = True
    teacher: str
    """A run, a checkpoint or a Hugging Face folder of the same vocabulary."""
    teacher_weights: WeightDtype = "fp32"
    """How the teacher's weights are held in memory."""
    privileged_prompt: str | None = None
    """What only the teacher is told, at the end of its system message; `{answer}` stands for the
    right answer."""
    beta: float = 0.5
    """0 is the forward KL, 1 the reverse."""
    distill_temperature: float = 1.0
    """Of both distributions."""
    on_policy_fraction: LinearRamp = LinearRamp()
    max_new_tokens: Count = 256
    """Tokens of an answer, at most."""
    sampling_temperature: float = 1.0
    """The temperature at which the student answers."""
    generation_batch_size: Count = 64
    """Answers that are made at the same time, by one process."""
    seed: int = 0
    """Random seed of sampling."""

    def __post_init__(self) -> None:
        check_divergence(self.beta, self.distill_temperature)
        for name in ("max_new_tokens", "generation_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.sampling_temperature > 0:
            raise ValueError(
                f"sampling_temperature={self.sampling_temperature} must be a number above 0"
            )

    def frozen_models(self) -> dict[str, str | None]:
        """Name the teacher model."""
        return {"teacher": self.teacher}

    def frozen_weight_dtype(self) -> WeightDtype:
        """How the teacher's weights are held."""
        return self.teacher_weights

    def build(self) -> "OnPolicyDistillation":
        """Build the objective."""
        return OnPolicyDistillation(self)


class DistillBatch(NamedTuple):
    """The same answers behind the student's prompts and behind the teacher's."""

    student: RolloutBatch
    teacher: RolloutBatch
    sampled: Tensor
    """(B,) bool: which answers are the student's."""

    def to(self, device: torch.device | str) -> "DistillBatch":
        """The same on `device`."""
        student, teacher = self.student.to(device), self.teacher.to(device)
        return DistillBatch(student, teacher, self.sampled.to(device))


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
        self.limits = GenerationLimits(
            max_new_tokens=self.config.max_new_tokens,
            max_seq_len=policy.config.max_seq_len,
            batch_size=self.config.generation_batch_size,
            temperature=self.config.sampling_temperature,
            eos_ids=eos_ids(tokenizer),
        )

    def batches(self, loader: RankLoader, policy: LM) -> Iterator[Any]:
        """Yield batches of answers without end."""
        while True:
            yield self.next_batch(loader, policy)

    def next_batch(self, loader: RankLoader, policy: LM) -> DistillBatch:
        """The next prompts, answered by the student or by the data; by the student too where the
        data has no answer.
        """
        number, first = loader.cursor // loader.batch_size, loader.cursor + loader.offset
        prompts = loader.next_prompts()
        own = _chance(self.config.seed, number) < self.config.on_policy_fraction.at(number)
        sampled = [own or prompt.answer is None for prompt in prompts]
        requested = [place for place, wanted in enumerate(sampled) if wanted]
        episodes = generate_rollouts(
            policy,
            [prompts[place].ids for place in requested],
            [derive_seed(self.config.seed, "answer", first + place) for place in requested],
            self.limits,
            poll=self.peers.poll,
        )
        output = {
            place: each.completion_ids for place, each in zip(requested, episodes, strict=True)
        }
        answers = [
            output[i] if i in output else self.dataset_answer_ids(p) for i, p in enumerate(prompts)
        ]
        return self.build_batch(prompts, answers, torch.tensor(sampled), policy.embed.weight.device)

    def dummy_batch(self, batch: Batch) -> DistillBatch:
        """The row as an answer to its first id, for both."""
        rows = [_episode(row[:1].tolist(), row[1:].tolist()) for row in batch.ids]
        both = collate(rows, batch.ids.device)
        return DistillBatch(both, both, torch.ones(len(rows), dtype=torch.bool))

    def evaluate(self, policy: LM, source: SampleSource, max_samples: int) -> dict[str, float]:
        """The divergence at greedy answers to held-back prompts, spread evenly over them."""
        count = min(max_samples, source.size)
        prompts = [source.get_prompts(i * source.size // count, 1)[0] for i in range(count)]
        requested, greedy = (
            [prompt.ids for prompt in prompts],
            replace(self.limits, temperature=0.0),
        )
        episodes = generate_rollouts(policy, requested, [0] * count, greedy, poll=self.peers.poll)
        answers, sampled = (
            [each.completion_ids for each in episodes],
            torch.ones(count, dtype=torch.bool),
        )
        example = self.build_batch(prompts, answers, sampled, policy.embed.weight.device)
        with torch.no_grad(), eval_mode(policy):
            found = self.loss(policy, example).metrics["loss"]
        cut = sum(each.finish_reason != "stop" for each in episodes) / count
        apart = float(found.total / found.count.clamp(min=1))
        return {"divergence": apart, "truncated_fraction": cut, "loss": apart}

    def dataset_answer_ids(self, prompt: Prompt) -> list[int]:
        """The answer of the data as ids, its end of turn included, at most `max_new`."""
        requested = read_prompt(prompt.record).prompt
        answer = Message(role="assistant", content=prompt.answer or "")
        ids, mask = encode_chat(
            self.tokenizer, replace(requested, messages=(*requested.messages, answer))
        )
        end = max(place for place, output in enumerate(mask) if output) + 1
        return ids[len(prompt.ids) : end][: self.config.max_new_tokens]

    def build_batch(
        self,
        prompts: list[Prompt],
        answers: list[list[int]],
        sampled: Tensor,
        device: torch.device,
    ) -> DistillBatch:
        """Rows for both; what of an answer does not fit behind both prompts is left out."""
        room = self.frozen_models["teacher"].config.max_seq_len
        student, teacher = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            reported = self.teacher_prompt_ids(prompt)[-room:]
            kept = answer[
                : max(0, min(room - len(reported), self.limits.max_seq_len - len(prompt.ids)))
            ]
            student.append(_episode(prompt.ids, kept))
            teacher.append(_episode(reported, kept))
        return DistillBatch(collate(student, device), collate(teacher, device), sampled.to(device))

    def teacher_prompt_ids(self, prompt: Prompt) -> list[int]:
        """The teacher's prompt: the student's, or one with the hint."""
        if self.config.privileged_prompt is None:
            return prompt.ids
        hint = self.config.privileged_prompt.replace("{answer}", prompt.answer or "")
        requested = read_prompt(prompt.record).prompt
        system = Message(role="system", content=hint)
        rest = requested.messages
        if rest[0].role == "system":
            system, rest = replace(rest[0], content=f"{rest[0].content}\n\n{hint}"), rest[1:]
        return encode_prompt(self.tokenizer, replace(requested, messages=(system, *rest)))

    def units(self, batch: Any) -> Tensor:
        """Tokens of answers."""
        return batch.student.mask.sum()

    def loss(self, policy: LM, batch: Any) -> Loss:
        """The teacher's forward pass without gradients, the student's with them."""
        student, teacher, sampled = batch
        lm = self.frozen_models["teacher"]
        with torch.no_grad():
            taught = lm(teacher.ids, segments=teacher.segments, logits=False).hidden
        out = policy(student.ids, segments=student.segments, logits=False)
        targets = student.targets[student.mask]
        total, seen = summed_divergence(
            HeadInputs(out.hidden[student.mask], policy.head.weight),
            HeadInputs(taught[teacher.mask], lm.head.weight),
            targets,
            torch.ones_like(targets, dtype=torch.float32),
            DistillWeights(self.config.beta, self.config.distill_temperature),
        )
        tokens = self.units(batch)
        rows = torch.tensor(len(sampled), device=sampled.device)
        metrics = {
            "loss": Metric(total.detach(), tokens),
            "nll": Metric(seen[1], tokens),
            "on_policy_fraction": Metric(sampled.sum(), rows),
            "completion_length": Metric(tokens, rows),
        }
        total = add_aux_losses(total, out.losses, tokens)
        return Loss(total, metrics | aux_metrics(out.losses, tokens), out.stats, out.grad_probes)


def _chance(seed: int, batch: int) -> float:
    """A number in [0, 1) that all processes agree about."""
    return derive_seed(seed, "batch", batch) % 2**32 / 2**32


def _episode(prompt: list[int], answer: list[int]) -> Rollout:
    episode = Rollout(list(prompt), seed=0)
    for token in answer:
        episode.append_token(token, 0.0)
    return episode

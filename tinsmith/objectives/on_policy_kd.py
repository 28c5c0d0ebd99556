"""On-policy distillation: the student generates completions, and a teacher gives the targets.

    loss = mean over tokens t of a completion y of D(teacher(. | x', y < t), student(. | x, y < t))

with D the generalised Jensen-Shannon divergence (GKD: Agarwal et al., 2306.13649, algorithm 1).
Completions are the student's own in a fraction of batches, which may increase during training,
without a gradient through sampling; in the other batches they are those of the data. The teacher
may get a longer prompt than the student (`privileged_prompt`), before the same completion.
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
    """The fraction of batches, counted from 0, with the student's own completions.

    It is `begin` for the first `after` batches, then changes linearly to `end` over the next
    `over`.
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
        """Return the fraction at batch `batch`."""
        progress = (
            min(max(batch - self.after, 0) / self.over, 1) if self.over else batch >= self.after
        )
        return self.begin + (self.end - self.begin) * progress


@dataclass(frozen=True, kw_only=True)
class OnPolicyKD(ObjectiveConfigBase):
    """Generate completions and learn the teacher's next-token distributions on them."""

    kind: Literal["on_policy_kd"] = "on_policy_kd"
    data_format: ClassVar[FormatName] = "prompts"
    generates: ClassVar[bool] = True
    teacher: str
    """A run, a checkpoint or a Hugging Face folder of the same vocabulary."""
    teacher_weights: WeightDtype = "fp32"
    """Storage of the teacher's weights in memory."""
    privileged_prompt: str | None = None
    """Text at the end of the teacher's system message, which the student does not get; `{answer}`
    is replaced by the prompt's answer."""
    beta: float = 0.5
    """0 is the forward KL, 1 the reverse."""
    distill_temperature: float = 1.0
    """Temperature of both distributions."""
    on_policy_fraction: LinearRamp = LinearRamp()
    max_new_tokens: Count = 256
    """Largest number of tokens of a completion."""
    sampling_temperature: float = 1.0
    """Temperature at which the student samples completions."""
    generation_batch_size: Count = 64
    """Number of completions generated at a time by one process."""
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
        """Return the path of the teacher model."""
        return {"teacher": self.teacher}

    def frozen_weight_dtype(self) -> WeightDtype:
        """Return the storage of the teacher's weights."""
        return self.teacher_weights

    def build(self) -> "OnPolicyDistillation":
        """Build the objective."""
        return OnPolicyDistillation(self)


class DistillBatch(NamedTuple):
    """The same completions after the student's prompts and after the teacher's."""

    student: RolloutBatch
    teacher: RolloutBatch
    sampled: Tensor
    """(B,) bool: which completions are the student's own."""

    def to(self, device: torch.device | str) -> "DistillBatch":
        """Return the batch on `device`."""
        student, teacher = self.student.to(device), self.teacher.to(device)
        return DistillBatch(student, teacher, self.sampled.to(device))


class OnPolicyDistillation(Objective):
    """The sum over completion tokens of the divergence; the unit is a completion token.

    No state is carried between batches: samples depend only on the weights and the position in the
    data.
    """

    def __init__(self, config: OnPolicyKD):
        super().__init__()
        self.config = config

    def prepare(self, policy: LM, tokenizer: Tokenizer) -> None:
        """Set the limits of generation."""
        self.tokenizer = tokenizer
        self.limits = GenerationLimits(
            max_new_tokens=self.config.max_new_tokens,
            max_seq_len=policy.config.max_seq_len,
            batch_size=self.config.generation_batch_size,
            temperature=self.config.sampling_temperature,
            eos_ids=tokenizer.eos_ids,
        )

    def batches(self, loader: RankLoader, policy: LM) -> Iterator[Any]:
        """Yield batches of completions without end."""
        while True:
            yield self.next_batch(loader, policy)

    def next_batch(self, loader: RankLoader, policy: LM) -> DistillBatch:
        """Return the next prompts with completions of the student or of the data.

        The student also completes prompts without an answer in the data.
        """
        batch_index = loader.cursor // loader.batch_size
        first = loader.cursor + loader.offset
        prompts = loader.next_prompts()
        fraction = self.config.on_policy_fraction.at(batch_index)
        on_policy = _uniform(self.config.seed, batch_index) < fraction
        sampled = [on_policy or prompt.answer is None for prompt in prompts]
        indices = [index for index, is_sampled in enumerate(sampled) if is_sampled]
        rollouts = generate_rollouts(
            policy,
            [prompts[index].ids for index in indices],
            [derive_seed(self.config.seed, "answer", first + index) for index in indices],
            self.limits,
            poll=self.peers.poll,
        )
        generated = {
            index: rollout.completion_ids for index, rollout in zip(indices, rollouts, strict=True)
        }
        completions = [
            generated[index] if index in generated else self.dataset_answer_ids(prompt)
            for index, prompt in enumerate(prompts)
        ]
        device = policy.embed.weight.device
        return self.build_batch(prompts, completions, torch.tensor(sampled), device)

    def dummy_batch(self, batch: Batch) -> DistillBatch:
        """Return a batch in which every row is a completion of its first id, for both models."""
        rollouts = [_rollout(row[:1].tolist(), row[1:].tolist()) for row in batch.ids]
        rows = collate(rollouts, batch.ids.device)
        return DistillBatch(rows, rows, torch.ones(len(rollouts), dtype=torch.bool))

    def evaluate(self, policy: LM, source: SampleSource, max_samples: int) -> dict[str, float]:
        """Return the divergence on greedy completions of validation prompts, spread evenly."""
        count = min(max_samples, source.size)
        prompts = [source.get_prompts(i * source.size // count, 1)[0] for i in range(count)]
        ids, greedy = [prompt.ids for prompt in prompts], replace(self.limits, temperature=0.0)
        rollouts = generate_rollouts(policy, ids, [0] * count, greedy, poll=self.peers.poll)
        completions = [rollout.completion_ids for rollout in rollouts]
        sampled = torch.ones(count, dtype=torch.bool)
        batch = self.build_batch(prompts, completions, sampled, policy.embed.weight.device)
        with torch.no_grad(), eval_mode(policy):
            loss = self.loss(policy, batch).metrics["loss"]
        truncated = sum(rollout.finish_reason != "stop" for rollout in rollouts) / count
        divergence = float(loss.total / loss.count.clamp(min=1))
        return {"divergence": divergence, "truncated_fraction": truncated, "loss": divergence}

    def dataset_answer_ids(self, prompt: Prompt) -> list[int]:
        """Return the ids of the data's answer, end of turn included, at most `max_new_tokens`."""
        chat = read_prompt(prompt.record).prompt
        answer = Message(role="assistant", content=prompt.answer or "")
        ids, mask = encode_chat(self.tokenizer, replace(chat, messages=(*chat.messages, answer)))
        end = max(position for position, is_target in enumerate(mask) if is_target) + 1
        return ids[len(prompt.ids) : end][: self.config.max_new_tokens]

    def build_batch(
        self,
        prompts: list[Prompt],
        answers: list[list[int]],
        sampled: Tensor,
        device: torch.device,
    ) -> DistillBatch:
        """Build rows for both models; a completion is truncated to fit after both prompts."""
        max_seq_len = self.frozen_models["teacher"].config.max_seq_len
        student, teacher = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            teacher_prompt = self.teacher_prompt_ids(prompt)[-max_seq_len:]
            teacher_room = max_seq_len - len(teacher_prompt)
            student_room = self.limits.max_seq_len - len(prompt.ids)
            truncated = answer[: max(0, min(teacher_room, student_room))]
            student.append(_rollout(prompt.ids, truncated))
            teacher.append(_rollout(teacher_prompt, truncated))
        return DistillBatch(collate(student, device), collate(teacher, device), sampled.to(device))

    def teacher_prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the teacher's prompt: the student's, with the privileged prompt if there
        is one.
        """
        if self.config.privileged_prompt is None:
            return prompt.ids
        privileged = self.config.privileged_prompt.replace("{answer}", prompt.answer or "")
        chat = read_prompt(prompt.record).prompt
        system = Message(role="system", content=privileged)
        others = chat.messages
        if others[0].role == "system":
            system = replace(others[0], content=f"{others[0].content}\n\n{privileged}")
            others = others[1:]
        return encode_prompt(self.tokenizer, replace(chat, messages=(system, *others)))

    def units(self, batch: Any) -> Tensor:
        """Count the completion tokens."""
        return batch.student.mask.sum()

    def loss(self, policy: LM, batch: Any) -> Loss:
        """Run the teacher without gradients and the student with them."""
        student, teacher, sampled = batch
        teacher_lm = self.frozen_models["teacher"]
        with torch.no_grad():
            teacher_hidden = teacher_lm(teacher.ids, segments=teacher.segments, logits=False).hidden
        out = policy(student.ids, segments=student.segments, logits=False)
        targets = student.targets[student.mask]
        total, term_sums = summed_divergence(
            HeadInputs(out.hidden[student.mask], policy.head.weight),
            HeadInputs(teacher_hidden[teacher.mask], teacher_lm.head.weight),
            targets,
            torch.ones_like(targets, dtype=torch.float32),
            DistillWeights(self.config.beta, self.config.distill_temperature),
        )
        num_tokens = self.units(batch)
        num_rows = torch.tensor(len(sampled), device=sampled.device)
        metrics = {
            "loss": Metric(total.detach(), num_tokens),
            "nll": Metric(term_sums[1], num_tokens),
            "on_policy_fraction": Metric(sampled.sum(), num_rows),
            "completion_length": Metric(num_tokens, num_rows),
        }
        total = add_aux_losses(total, out.losses, num_tokens)
        return Loss(
            total, metrics | aux_metrics(out.losses, num_tokens), out.stats, out.grad_probes
        )


def _uniform(seed: int, batch: int) -> float:
    """Return a number in [0, 1), equal in all processes."""
    return derive_seed(seed, "batch", batch) % 2**32 / 2**32


def _rollout(prompt: list[int], completion: list[int]) -> Rollout:
    rollout = Rollout(list(prompt), seed=0)
    for token in completion:
        rollout.append_token(token, 0.0)
    return rollout

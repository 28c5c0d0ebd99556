"""Base of the reinforcement-learning objectives: rollouts, rewards and minibatches.

A rollout has five stages, then a loss per minibatch; each is a method of `RLObjective`:

    generate            prompts -> completions sampled from the policy
    score               completions -> rewards
    old_logprobs        log-probabilities by a training forward pass of the policy
    reference_logprobs  log-probabilities by the reference model
    compute_advantages  rewards -> advantages
    loss                one call per minibatch, `num_epochs` passes over `num_minibatches`

A rollout takes `train.batch_size` prompts over all processes, with `num_generations` completions
each. Its minibatches are the micro-batches of the trainer: if `train.grad_accum_steps` is
`num_minibatches`, a pass is one optimizer step. Minibatch k has every `num_minibatches`-th prompt
with all its completions, so minibatches are the same for any number of processes. The current
rollout and the position in it are saved with the run.

The policy has no dropout and no router noise (`objectives.frozen`), and old log-probabilities come
from the forward pass of training, with the same rows, kernels and precision, as in TRL and verl. So
every ratio is exactly 1 before the first step on a rollout. The engine that samples rounds
otherwise: in bf16 a router then selects other experts, which moved 2.5 % of the ratios out of the
clip range before any step, and is a known cause of collapse (2510.11370). The metrics
`sampling_logprob_difference` and `sampling_clip_fraction` report that mismatch.
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
from tinsmith.losses.logprobs import target_logprobs
from tinsmith.nn.model import LM, ModelOut
from tinsmith.objectives.base import (
    Loss,
    Objective,
    ObjectiveConfigBase,
    RankLoader,
    SampleSource,
)
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

CHECKED_PROMPTS = 100
"""Number of prompts that are checked before the first step."""


@dataclass(frozen=True, kw_only=True)
class RLConfig(ObjectiveConfigBase):
    """Keys that all reinforcement-learning objectives share."""

    data_format: ClassVar[FormatName] = "prompts"
    finetune_lr: ClassVar[float] = 1e-6
    generates: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True
    rewards: tuple[RewardConfig, ...] = (ExactMatchReward(),)
    """Reward functions and models; the reward is their weighted sum."""
    num_generations: Count = 1
    """Completions of one prompt (group size)."""
    max_new_tokens: Count = 256
    """Largest number of tokens in a completion."""
    temperature: float = 1.0
    """Temperature of sampling and of all log-probabilities in the loss."""
    generation_batch_size: Count = 64
    """Completions that a process generates at the same time."""
    num_minibatches: Count = 1
    """Minibatches of a rollout."""
    num_epochs: Count = 1
    """Passes over a rollout (PPO epochs)."""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the reference, the policy before its first step. With 0 no
    reference is kept.
    """
    mask_truncated: bool = False
    """If True, completions that reached `max_new_tokens` are left out of the loss."""
    truncation_penalty: float = 0.0
    """Subtracted from the reward of a completion that reached `max_new_tokens`."""
    tools: tuple[ToolName, ...] = ()
    """Tools that the policy may call; prompts must describe them."""
    max_turns: Count = 3
    """Largest number of turns of the policy in a rollout with tools."""
    seed: int = 0
    """Random seed of sampling."""
    router_losses: bool = False
    """If True, the load-balancing losses of routers are trained on, as in pretraining."""

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

    def trains_router_losses(self) -> bool:
        """Return the key `router_losses`."""
        return self.router_losses

    @property
    def max_response_tokens(self) -> int:
        """Return the largest number of tokens that the policy generates for a prompt."""
        return self.max_new_tokens * (self.max_turns if self.tools else 1)

    def frozen_models(self) -> dict[str, str | None]:
        """Name the reference model if `kl_coef` is above 0."""
        return {"reference": None} if self.kl_coef > 0 else {}

    def check_rank_batch(self, num_prompts: int) -> None:
        """Raise UserError if minibatches of a rollout would differ in size."""
        if num_prompts % self.num_minibatches:
            raise UserError(
                f"objective.num_minibatches: {self.num_minibatches} must divide the {num_prompts} "
                "prompts of a process (train.batch_size over the processes)"
            )

    def reward_models(self) -> tuple[str, ...]:
        """Return the folders of the reward models among the rewards."""
        return tuple(each.path for each in self.rewards if isinstance(each, RewardModelReward))


class RLObjective(Objective):
    """Train on completions of the policy's own. Subclasses compute advantages and the loss."""

    def __init__(self, config: RLConfig):
        super().__init__()
        self.config = config
        self.rollout: RolloutBatch | None = None
        self.minibatch_index = 0
        """Minibatches of `rollout` that were used, over all passes."""

    def prepare(self, policy: LM, tokenizer: Tokenizer) -> None:
        """Build reward functions and generation limits. Raise ValueError if the policy has dropout
        or router noise.
        """
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
            eos_ids=tokenizer.eos_ids,
        )

    def check_data(self, source: SampleSource) -> None:
        """Raise UserError if some reward can score none of the first prompts."""
        prompts = source.get_prompts(0, min(CHECKED_PROMPTS, source.size))
        for reward in self.config.rewards:
            if not any(map(reward.can_score, prompts)):
                fields = ", ".join(prompts[0].record) or "none"
                raise UserError(
                    f"objective.rewards: {reward.kind} needs answers, and none of the first "
                    f"{len(prompts)} prompts has one (fields: {fields})"
                )

    def batches(self, loader: RankLoader, policy: LM) -> Iterator[Any]:
        """Yield the minibatches of one rollout after the other, without end.

        Raise UserError if the prompts of this process cannot be divided evenly.
        """
        num_minibatches, num_epochs = self.config.num_minibatches, self.config.num_epochs
        self.config.check_rank_batch(loader.rank_batch_size)
        while True:
            if self.rollout is None or self.minibatch_index >= num_minibatches * num_epochs:
                self.rollout, self.minibatch_index = self.next_rollout(loader, policy), 0
            index = self.minibatch_index % num_minibatches
            self.minibatch_index += 1
            yield self.rollout.select_rows(self._minibatch_rows(index, loader.rank_batch_size))

    def _minibatch_rows(self, index: int, num_prompts: int) -> Tensor:
        """Return the rows of a minibatch: all completions of every `num_minibatches`-th prompt."""
        group_size = self.config.num_generations
        prompts = torch.arange(index, num_prompts, self.config.num_minibatches)
        return (prompts[:, None] * group_size + torch.arange(group_size)).flatten()

    def next_rollout(self, loader: RankLoader, policy: LM) -> RolloutBatch:
        """Run the stages of a rollout on the next prompts."""
        first, group_size = loader.cursor + loader.offset, self.config.num_generations
        prompts = loader.next_prompts()
        repeated = [prompt for prompt in prompts for _ in range(group_size)]
        seeds = [
            derive_seed(self.config.seed, "answer", first + index, generation)
            for index in range(len(prompts))
            for generation in range(group_size)
        ]
        rollouts = self.generate(policy, repeated, seeds)
        rows = self.collate(policy, rollouts, self.score(repeated, rollouts))
        rows = rows._replace(old_logprobs=self.old_logprobs(policy, rows, len(prompts)))
        rows = rows._replace(ref_logprobs=self.reference_logprobs(policy, rows))
        return self.compute_advantages(policy, prompts, rows)

    def generate(
        self,
        policy: LM,
        prompts: list[Prompt],
        seeds: list[int],
        limits: GenerationLimits | None = None,
    ) -> list[Rollout]:
        """Sample one completion per prompt from the policy."""
        ids = [prompt.ids for prompt in prompts]
        return generate_rollouts(
            policy, ids, seeds, limits or self.limits, reply=self.reply, poll=self.peers.poll
        )

    def score(self, prompts: list[Prompt], rollouts: list[Rollout]) -> Tensor:
        """Return the rewards (B,), less the penalty of truncated completions; NaN if one failed."""
        rewards = torch.tensor(self.raw_rewards(prompts, rollouts))
        truncated = torch.tensor([rollout.finish_reason != "stop" for rollout in rollouts])
        return torch.where(
            torch.isfinite(rewards), rewards - self.config.truncation_penalty * truncated, math.nan
        )

    def old_logprobs(self, policy: LM, rows: RolloutBatch, num_prompts: int) -> Tensor:
        """Return log-probabilities (B, T) by the policy before its first step on the rollout.

        Each minibatch is a forward pass as `loss` computes it: in training mode and with gradients
        enabled, because other kernels round differently.
        """
        old = torch.zeros_like(rows.old_logprobs)
        for index in range(self.config.num_minibatches):
            selected = self._minibatch_rows(index, num_prompts)
            part = rows.select_rows(selected)
            with torch.enable_grad():
                logprobs = self.logprobs(policy, part)[0].detach()
            width = logprobs.shape[1]
            old[selected, :width] = torch.where(part.mask, logprobs, 0).to(old.dtype)
        return old

    def reference_logprobs(self, policy: LM, rows: RolloutBatch) -> Tensor:
        """Return log-probabilities (B, T) by the reference model, or the old ones of the policy if
        there is no reference.
        """
        if not self.config.frozen_models():
            return rows.old_logprobs
        with reference_model(policy, self.frozen_models.get("reference")) as lm:
            return self.logprobs(lm, rows)[0]

    def compute_advantages(
        self, policy: LM, prompts: list[Prompt], rows: RolloutBatch
    ) -> RolloutBatch:
        """Return the rollout with advantages, and with values and returns if the loss reads them.
        `prompts` are listed once each, without repetition.
        """
        raise NotImplementedError

    def loss(self, policy: LM, batch: RolloutBatch) -> Loss:
        """Compute the loss of one minibatch, summed over units."""
        raise NotImplementedError

    def collate(self, policy: LM, rollouts: list[Rollout], rewards: Tensor) -> RolloutBatch:
        """Pad rollouts to rows on the policy's device. Rows without a finite reward are left out of
        the loss, and truncated ones if `mask_truncated`.
        """
        rows = collate(rollouts, policy.embed.weight.device)
        rewards = rewards.to(rows.old_logprobs)
        in_loss = torch.isfinite(rewards)
        if self.config.mask_truncated:
            in_loss = in_loss & ~rows.truncated
        return rows._replace(rewards=rewards, mask=rows.mask & in_loss[:, None])

    def raw_rewards(self, prompts: list[Prompt], rollouts: list[Rollout]) -> list[float]:
        """Return the weighted sum of rewards of each rollout. If one fails it is NaN, with a
        warning.
        """
        responses = [
            Response(prompt, self.tokenizer.decode(self.response_ids(rollout)), rollout.ids)
            for prompt, rollout in zip(prompts, rollouts, strict=True)
        ]
        scored = score_responses(self.weighted_rewards, responses)
        for failure in scored.failures:
            scored.rewards[failure.response_index] = math.nan
            print_warning(
                f"no reward: {failure.reward_name} of prompt {failure.prompt_id}: {failure.reason}"
            )
        return scored.rewards

    def response_ids(self, rollout: Rollout) -> list[int]:
        """Return the ids of the last turn without its end token."""
        newest = rollout.last_turn_ids
        return newest[:-1] if newest and newest[-1] in self.limits.eos_ids else newest

    def dummy_batch(self, batch: Batch) -> RolloutBatch:
        """Return one group of equal completions."""
        group_size = self.config.num_generations
        rollouts = [Rollout([*row.tolist()], seed=0) for row in batch.ids.repeat(group_size, 1)]
        for rollout in rollouts:
            rollout.response_mask = [False] + [True] * (len(rollout.ids) - 1)
        return collate(rollouts, batch.ids.device)

    def evaluate(self, policy: LM, source: SampleSource, max_samples: int) -> dict[str, float]:
        """Score greedy completions of validation prompts, spread evenly over the data set."""
        count = min(max_samples, source.size)
        prompts = [source.get_prompts(i * source.size // count, 1)[0] for i in range(count)]
        greedy = replace(self.limits, temperature=0.0)
        rollouts = self.generate(policy, prompts, [0] * count, greedy)
        reward = float(self.score(prompts, rollouts).nanmean())
        tokens = sum(sum(rollout.response_mask) for rollout in rollouts)
        truncated = sum(rollout.finish_reason != "stop" for rollout in rollouts)
        metrics = {
            "reward": reward,
            "completion_length": tokens / count,
            "truncated_fraction": truncated / count,
        }
        if self.config.tools:
            metrics["turns"] = sum(rollout.turns for rollout in rollouts) / count
        return metrics | {"loss": -reward}

    def logprobs(self, lm: LM, rows: RolloutBatch) -> tuple[Tensor, ModelOut]:
        """Return log-probabilities (B, T) of the response tokens at the sampling temperature, and
        the output of the model.
        """
        out = lm(rows.ids, segments=rows.segments, logits=False)
        logprobs = target_logprobs(
            out.hidden, rows.targets, rows.mask, lm.head, self.config.temperature
        )
        return logprobs, out

    def state(self) -> dict[str, object]:
        """Return the position in the rollout."""
        return {"place": self.minibatch_index}

    def load_state(self, saved: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.minibatch_index = saved["place"]

    def snapshot(self) -> Any:
        """Return the rollout and the position in it."""
        return self.rollout, self.minibatch_index

    def restore_snapshot(self, snapshot: Any) -> None:
        """Return to the state of `snapshot`."""
        self.rollout, self.minibatch_index = snapshot

    def rank_state(self) -> dict[str, Tensor]:
        """Return the current rollout if some of its minibatches are unused."""
        over = self.minibatch_index >= self.config.num_minibatches * self.config.num_epochs
        return {} if self.rollout is None or over else self.rollout._asdict()

    def load_rank_state(self, saved: dict[str, Tensor]) -> None:
        """Restore what `rank_state` returned."""
        self.rollout = RolloutBatch(**saved) if saved else None

    def reshard_rank_state(
        self, parts: list[dict[str, Tensor]], rank: int, world_size: int
    ) -> dict[str, Tensor]:
        """Return an equal share of all rows, in their order."""
        if not parts[0]:
            return {}
        whole = concat_rollouts([RolloutBatch(**part) for part in parts])
        share = len(whole.ids) // world_size
        return whole.select_rows(torch.arange(rank * share, (rank + 1) * share))._asdict()

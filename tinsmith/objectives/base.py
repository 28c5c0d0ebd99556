"""The interface of objectives: a batch goes in, a sum of losses and its number of units come out.
The trainer divides by the units of all micro-batches and ranks.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tinsmith.core.parse import Config
from tinsmith.data.formats import FormatName
from tinsmith.data.formats.prompts import Prompt
from tinsmith.data.loader.batch import Batch
from tinsmith.distributed.group import Peers, SingleProcess
from tinsmith.nn.model import LM
from tinsmith.nn.quant import WeightDtype
from tinsmith.rewards.model import RewardModel
from tinsmith.text.tokenizer import Tokenizer


class Metric(NamedTuple):
    """A total and its count. The mean is taken once, over all micro-batches and ranks."""

    total: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]


class Loss(NamedTuple):
    """The loss of one micro-batch, with what the layers returned."""

    total: Tensor
    """Sum over the units of the batch, not a mean."""
    metrics: dict[str, Metric] = {}
    stats: dict[str, Tensor] = {}
    grad_probes: dict[str, Tensor] = {}


class SampleSource(Protocol):
    """Samples by global index: a pure function of the seed and the index."""

    def get_batch(self, start: int, count: int) -> Batch:
        """Return the global samples [start, start + count). A pair is two rows, the chosen answer
        first.
        """
        ...

    def get_prompts(self, start: int, count: int) -> list[Prompt]:
        """Return the global samples [start, start + count) of a dataset of prompts."""
        ...

    @property
    def size(self) -> int:
        """Samples of one pass; every `Prompt.prompt_id` is smaller."""
        ...


class RankLoader:
    """One rank's share of the global order of samples. Its whole state is one integer, `cursor`.

    Iterating yields batches. An objective that generates completions calls `next_prompts` instead:
    every call returns this rank's part of the next `batch_size` prompts.
    """

    def __init__(self, source: SampleSource, batch_size: int, rank: int, world_size: int):
        self.source = source
        self.batch_size = batch_size
        self.rank_batch_size = batch_size // world_size
        self.offset = rank * self.rank_batch_size
        self.cursor = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.source.get_batch(self.cursor + self.offset, self.rank_batch_size)
        self.cursor += self.batch_size
        return batch

    def next_prompts(self) -> list[Prompt]:
        """Return this rank's part of the next prompts."""
        prompts = self.source.get_prompts(self.cursor + self.offset, self.rank_batch_size)
        self.cursor += self.batch_size
        return prompts


class ObjectiveConfigBase(Config):
    """Base of every objective's config."""

    generates: ClassVar[bool] = False
    """True if the policy generates completions during training. Each process then needs the whole
    policy.
    """
    deterministic: ClassVar[bool] = False
    """If True, train without dropout and router noise, so that old and new log-probabilities are
    equal at the first step (`objectives.frozen`).
    """

    finetune_lr: ClassVar[float] = 2e-5
    """Default learning rate of AdamW for a model of `init_from`, as in TRL's trainers. The default
    of LoRA adapters is ten times as much.
    """

    def trains_router_losses(self) -> bool:
        """Return True if load-balancing losses of the model are part of the loss."""
        return True

    @property
    def data_format(self) -> FormatName:
        """Name of the data format that the objective reads (`data.formats`)."""
        raise NotImplementedError

    def frozen_models(self) -> dict[str, str | None]:
        """Return the frozen models by name (`reference` or `teacher`): the folder of each, or None
        for the policy before its first step.
        """
        return {}

    def frozen_weight_dtype(self) -> WeightDtype:
        """Return the dtype of the weights of frozen models in memory."""
        return "fp32"

    def reward_models(self) -> tuple[str, ...]:
        """Return the folders of the reward models that the objective uses."""
        return ()

    def check_rank_batch(self, num_prompts: int) -> None:
        """Raise UserError if a rank's part of `train.batch_size` cannot be divided evenly."""

    def build(self) -> "Objective":
        """Build the objective."""
        raise NotImplementedError


class Objective(nn.Module):
    """A loss with its state. Trainable heads and buffers are saved with the run; frozen models are
    not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen_models: dict[str, LM] = {}
        """The config's `frozen_models()`, in eval mode and without gradients; set by the trainer.
        The reference is absent if the policy has LoRA adapters: `objectives.frozen.reference_model`
        then disables the adapters instead.
        """
        self.reward_models: dict[str, RewardModel] = {}
        """The config's `reward_models()` by folder; set by the trainer."""
        self.peers: Peers = SingleProcess()
        """The other processes of the run; set by the trainer."""

    def prepare(self, policy: LM, tokenizer: Tokenizer) -> None:
        """Create heads, stop tokens and reward functions, which depend on the model and tokenizer.
        Called once, before the optimizers are built.
        """

    def check_data(self, source: SampleSource) -> None:
        """Raise UserError if the training data cannot be used. Called before the first step."""

    def batches(self, loader: RankLoader, policy: LM) -> Iterator[Any]:
        """Yield batches without end; by default those of the loader. A batch has `to(device)`, and
        is passed to `units` and `loss`.
        """
        return iter(loader)

    def units(self, batch: Any) -> Tensor:
        """Return the number of units in the batch: target tokens, pairs or sequences."""
        raise NotImplementedError

    def loss(self, policy: LM, batch: Any) -> Loss:
        """Run the forward pass and return the sum of losses over the units of the batch."""
        raise NotImplementedError

    def dummy_batch(self, batch: Batch) -> Any:
        """Return a batch for `loss` and `units` from rows of random ids, for a dry run."""
        return batch

    def evaluate(self, policy: LM, source: SampleSource, max_samples: int) -> dict[str, float]:
        """Generate completions of at most `max_samples` validation prompts and return metrics,
        equal on every process. The best checkpoint is that of the lowest `loss`.
        """
        raise NotImplementedError

    def accept_step(self, means: dict[str, float]) -> bool:
        """Return False to drop the gradients of a step, given its means over all ranks."""
        return True

    def state(self) -> dict[str, object]:
        """Return the state besides buffers and parameters that a resumed run needs, JSON-ready."""
        return {}

    def load_state(self, saved: dict[str, object]) -> None:
        """Restore the result of `state`."""

    def snapshot(self) -> Any:
        """Return a cheap copy of the state for `restore_snapshot`; called before every step."""
        return self.state()

    def restore_snapshot(self, snapshot: Any) -> None:
        """Restore a snapshot after an interrupted step."""
        self.load_state(snapshot)

    def rank_state(self) -> dict[str, Tensor]:
        """Return the tensors of this rank that a resumed run needs."""
        return {}

    def load_rank_state(self, saved: dict[str, Tensor]) -> None:
        """Restore the result of `rank_state`, before `batches` is called again."""

    def reshard_rank_state(
        self, parts: list[dict[str, Tensor]], rank: int, world_size: int
    ) -> dict[str, Tensor]:
        """Return the rank state of `rank` when `parts` were saved by another number of ranks."""
        return {}


def add_aux_losses(total: Tensor, losses: dict[str, Tensor], weight: Tensor) -> Tensor:
    """Add the model's auxiliary losses, which are means over the batch, times the number of units,
    so that the trainer's division by units restores the means.
    """
    for value in losses.values():
        total = total + value * weight
    return total


def aux_metrics(losses: dict[str, Tensor], weight: Tensor) -> dict[str, Metric]:
    """Return the auxiliary losses by kind, each summed over layers."""
    sums: dict[str, Tensor] = {}
    for name, value in losses.items():
        kind = name.rsplit(".", 1)[-1]
        sums[kind] = sums.get(kind, torch.zeros_like(value)) + value.detach()
    return {name: Metric(value * weight, weight) for name, value in sums.items()}

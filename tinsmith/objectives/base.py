"""What every objective is: batches in, a sum and its units out. The trainer divides, once, by
the global units.
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
    """A total and the number of things it is a total of; the mean is formed once, over all
    micro-batches and ranks.
    """

    total: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]


class Loss(NamedTuple):
    """What one micro-batch says."""

    total: Tensor
    """A sum over units, not a mean."""
    metrics: dict[str, Metric] = {}
    stats: dict[str, Tensor] = {}
    grad_probes: dict[str, Tensor] = {}


class SampleSource(Protocol):
    """Samples by global number: a pure function of the seed and the number."""

    def get_batch(self, start: int, count: int) -> Batch:
        """The global samples [start, start + count); of pairs each is two rows, the chosen answer
        and then the rejected one.
        """
        ...

    def get_prompts(self, start: int, count: int) -> list[Prompt]:
        """The same of a source of prompts, with what answers are judged by."""
        ...

    @property
    def size(self) -> int:
        """Samples of one pass; `Prompt.number` is below it."""
        ...


class RankLoader:
    """One rank's share of the global order of samples. The whole state is one integer, `cursor`.

    Iterated it gives batches, as most objectives want them. One that generates answers asks for
    `prompts()` in its own `batches` instead: every call gives this rank's part of the next `rows`
    prompts of the global order.
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
        """The next prompts: ids with the header of the answer, the right answer, a stable number,
        the whole row of the data.
        """
        found = self.source.get_prompts(self.cursor + self.offset, self.rank_batch_size)
        self.cursor += self.batch_size
        return found


class ObjectiveConfigBase(Config):
    """Base of every objective's config."""

    generates: ClassVar[bool] = False
    """Whether the policy generates answers while it is trained; then each process needs all of
    it.
    """
    deterministic: ClassVar[bool] = False
    """Whether the policy is compared with itself as it was, so that it is to have no dropout and no
    router noise (`objectives.frozen`).
    """

    @property
    def data_format(self) -> FormatName:
        """What it reads: documents, chats, pairs or prompts."""
        raise NotImplementedError

    def frozen_models(self) -> dict[str, str | None]:
        """The frozen models it wants, by name: the folder of each, or None for the policy as it
        stands before the first step.
        """
        return {}

    def frozen_weight_dtype(self) -> WeightDtype:
        """How the weights of these models are held in memory."""
        return "fp32"

    def reward_models(self) -> tuple[str, ...]:
        """The folders of the trained reward models that it asks."""
        return ()

    def check_rank_batch(self, num_prompts: int) -> None:
        """Raise UserError if a rank's part of `train.batch_size` cannot be divided evenly."""

    def build(self) -> "Objective":
        """Build the objective."""
        raise NotImplementedError


class Objective(nn.Module):
    """May own trainable heads and remembered buffers, which are saved with the run; `frozen`
    models are not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen_models: dict[str, LM] = {}
        """The config's `judges()`, in eval mode and without gradients; brought by the trainer. One
        that is the policy before its first step is missing where the policy has adapters to switch
        off: `objectives.frozen` knows both.
        """
        self.reward_models: dict[str, RewardModel] = {}
        """The config's `reward_models()` by their folders; brought by the trainer."""
        self.peers: Peers = SingleProcess()
        """Brought by the trainer too."""

    def prepare(self, policy: LM, tokenizer: Tokenizer) -> None:
        """Make what depends on the model's sizes and its vocabulary; called once, before the
        optimizers are made.
        """

    def batches(self, loader: RankLoader, policy: LM) -> Iterator[Any]:
        """What to train on, endlessly: here, the feed as it is. Whatever it gives has
        `to(device)`, and is what `weight` and `loss` are asked about.
        """
        return iter(loader)

    def units(self, batch: Any) -> Tensor:
        """How many units the batch holds: target tokens, pairs, sequences."""
        raise NotImplementedError

    def loss(self, policy: LM, batch: Any) -> Loss:
        """Forward pass and sum of losses over the batch's units."""
        raise NotImplementedError

    def dummy_batch(self, batch: Batch) -> Any:
        """What `loss` and `weight` want, made of a row of random ids: for a dry run."""
        return batch

    def evaluate(self, policy: LM, source: SampleSource, max_samples: int) -> dict[str, float]:
        """Numbers by name of `rows` held-back prompts, for objectives that answer them; the best
        checkpoint is that of the smallest `loss`. The same on every process.
        """
        raise NotImplementedError

    def accept_step(self, means: dict[str, float]) -> bool:
        """Asked after the all-reduce, before the optimizer's step; False drops the gradients."""
        return True

    def state(self) -> dict[str, object]:
        """What a resumed run needs beside buffers and parameters; JSON-ready."""
        return {}

    def load_state(self, saved: dict[str, object]) -> None:
        """Put back what `progress` gave."""

    def snapshot(self) -> Any:
        """Where it stands, for `rewind` in this process; called before every step, so cheap."""
        return self.state()

    def restore_snapshot(self, snapshot: Any) -> None:
        """Stand where `mark` was taken."""
        self.load_state(snapshot)

    def rank_state(self) -> dict[str, Tensor]:
        """Tensors of this process alone that a resumed run needs."""
        return {}

    def load_rank_state(self, saved: dict[str, Tensor]) -> None:
        """Put back what `carried` gave, before `batches` is asked again."""

    def reshard_rank_state(
        self, parts: list[dict[str, Tensor]], rank: int, world_size: int
    ) -> dict[str, Tensor]:
        """What process `rank` of `world` goes on with where another number of them carried
        `parts`.
        """
        return {}


def add_aux_losses(total: Tensor, losses: dict[str, Tensor], weight: Tensor) -> Tensor:
    """Add the model's own losses, which are means over the batch, so that they scale with the
    same denominator.
    """
    for value in losses.values():
        total = total + value * weight
    return total


def aux_metrics(losses: dict[str, Tensor], weight: Tensor) -> dict[str, Metric]:
    """The model's own losses by their last name, each summed over its layers."""
    sums: dict[str, Tensor] = {}
    for name, value in losses.items():
        short = name.rsplit(".", 1)[-1]
        sums[short] = sums.get(short, torch.zeros_like(value)) + value.detach()
    return {name: Metric(value * weight, weight) for name, value in sums.items()}

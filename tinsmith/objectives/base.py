"""What every objective is: batches in, a sum and its units out. The trainer divides, once, by
the global units.
"""

from collections.abc import Iterator
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tinsmith.core.parse import Config
from tinsmith.data.batch import Batch
from tinsmith.data.config import Shape
from tinsmith.data.prompts import Prompt
from tinsmith.nn.model import LM


class Metric(NamedTuple):
    """A total and the number of things it is a total of; the mean is formed once, over all
    micro-batches and ranks.
    """

    total: Tensor
    count: Tensor


class Loss(NamedTuple):
    """What one micro-batch says."""

    total: Tensor
    """A sum over units, not a mean."""
    metrics: dict[str, Metric] = {}
    stats: dict[str, Tensor] = {}
    probes: dict[str, Tensor] = {}


class Source(Protocol):
    """Samples by global number: a pure function of the seed and the number."""

    def rows(self, start: int, count: int) -> Batch:
        """The global samples [start, start + count); of pairs each is two rows, the chosen answer
        and then the rejected one.
        """
        ...

    def prompts(self, start: int, count: int) -> list[Prompt]:
        """The same of a source of prompts, with what answers are judged by."""
        ...

    @property
    def size(self) -> int:
        """Samples of one pass; `Prompt.number` is below it."""
        ...


class Feed:
    """One rank's share of the global order of samples. The whole state is one integer, `cursor`.

    Iterated it gives batches, as most objectives want them. One that generates answers asks for
    `prompts()` in its own `batches` instead: every call gives this rank's part of the next `rows`
    prompts of the global order.
    """

    def __init__(self, source: Source, rows: int, rank: int, world: int):
        self.source = source
        self.rows = rows
        self.share = rows // world
        self.offset = rank * self.share
        self.cursor = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.source.rows(self.cursor + self.offset, self.share)
        self.cursor += self.rows
        return batch

    def prompts(self) -> list[Prompt]:
        """The next prompts: ids with the header of the answer, the right answer, a stable number,
        the whole row of the data.
        """
        found = self.source.prompts(self.cursor + self.offset, self.share)
        self.cursor += self.rows
        return found


class ObjectiveConfigBase(Config):
    """Base of every objective's config."""

    shape: ClassVar[Shape]
    """What it reads: documents, chats, pairs or prompts."""

    def judges(self) -> dict[str, str | None]:
        """The frozen models it wants, by name: the folder of each, or None for the policy as it
        stands before the first step.
        """
        return {}

    def build(self) -> "Objective":
        """The objective."""
        raise NotImplementedError


class Objective(nn.Module):
    """May own trainable heads and remembered buffers, which are saved with the run; `frozen`
    models are not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen: dict[str, LM] = {}
        """The config's `judges()`, in eval mode and without gradients; brought by the trainer."""

    def adopt(self, policy: LM) -> None:
        """Make what depends on the policy's sizes, such as heads; called once, before training."""

    def batches(self, feed: Feed, policy: LM) -> Iterator[Batch]:
        """What to train on, endlessly: here, the feed as it is."""
        return iter(feed)

    def weight(self, batch: Batch) -> Tensor:
        """How many units the batch holds: target tokens, pairs, sequences."""
        raise NotImplementedError

    def loss(self, policy: LM, batch: Batch) -> Loss:
        """Forward pass and sum of losses over the batch's units."""
        raise NotImplementedError

    def accept(self, means: dict[str, float]) -> bool:
        """Asked after the all-reduce, before the optimizer's step; False drops the gradients."""
        return True

    def progress(self) -> dict[str, object]:
        """What a resumed run needs beside buffers and parameters; JSON-ready."""
        return {}

    def restore_progress(self, saved: dict[str, object]) -> None:
        """Put back what `progress` gave."""


def with_aux(total: Tensor, losses: dict[str, Tensor], weight: Tensor) -> Tensor:
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

"""The dataset that the trainer reads batches from: an endless, seeded, seekable order of samples
over one or several prepared sources.

Sample i of the global order is a pure function of (folder, seq_len, seed, i). Each rank reads its
own ranges of i, a resumed run continues at the next i, and nothing is replayed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinsmith.core.errors import UserError
from tinsmith.data.formats import FORMATS, FormatName
from tinsmith.data.formats.prompts import Prompt, PromptSamples
from tinsmith.data.loader.batch import Batch, collate
from tinsmith.data.loader.mixture import Mixture
from tinsmith.data.loader.order import order_many
from tinsmith.data.loader.pack import IndexedSamples
from tinsmith.data.prepare.prepared import read_report
from tinsmith.data.prepare.shards import Shards

SplitName = Literal["train", "validation"]


class DatasetMember(NamedTuple):
    """One prepared source of a dataset."""

    name: str
    source_index: int
    weight: float
    samples: IndexedSamples
    tokens: int
    bytes: int


class TokenizedDataset:
    """Samples by global index: packed rows of documents or chats, single chats, pairs (two rows
    each, the chosen answer first), or prompts.

    `train` samples are endless, shuffled anew in every epoch of every member, and mixed by weight.
    The `size` `validation` samples are in order, member after member.
    """

    def __init__(self, members: list[DatasetMember], seq_len: int, seed: int, split: SplitName):
        self._members, self._seed, self.seq_len = members, seed, seq_len
        self.split: SplitName = split
        self._mixture = Mixture([member.weight for member in members], seed)
        self._offsets = np.cumsum([0, *(member.samples.size for member in members)])

    @property
    def names(self) -> list[str]:
        """Names of the members. `Batch.source` is an index into the recipe's `data` list."""
        return [member.name for member in self._members]

    @property
    def size(self) -> int:
        """Samples of one pass over all members."""
        return int(self._offsets[-1])

    @property
    def tokens(self) -> int:
        """Tokens of all members."""
        return sum(member.tokens for member in self._members)

    @property
    def bytes(self) -> int:
        """Bytes of text of all members."""
        return sum(member.bytes for member in self._members)

    @property
    def packing_efficiency(self) -> float:
        """Fraction of positions that are not padding."""
        return sum(member.samples.num_tokens for member in self._members) / (
            self.size * self.seq_len
        )

    @property
    def num_split_chats(self) -> int:
        """Number of chats that are longer than a row and continue in another one."""
        return sum(member.samples.num_split_chats for member in self._members)

    @property
    def num_skipped_pieces(self) -> int:
        """Number of pieces of such chats that are left out because no token in them is trained."""
        return sum(member.samples.num_skipped_pieces for member in self._members)

    def epoch_of(self, index: int) -> float:
        """Return the number of epochs before global sample `index`."""
        return index / self.size

    def cursors(self, index: int) -> dict[str, int]:
        """Return how many samples each member has contributed before global sample `index`."""
        if self.split == "validation":
            counts = np.clip(index - self._offsets[:-1], 0, np.diff(self._offsets))
        else:
            counts = self._mixture.cursors(index)
        return dict(zip(self.names, map(int, counts), strict=True))

    def get_batch(self, start: int, count: int) -> Batch:
        """Return the global samples [start, start + count). Validation samples end at `size`."""
        return self.take(self._range(start, count))

    def get_prompts(self, start: int, count: int) -> list[Prompt]:
        """Return the global samples [start, start + count) of a dataset of prompts."""
        indices = self._range(start, count)
        prompts = []
        for m, index in zip(*(part.tolist() for part in self._locate(indices)), strict=True):
            samples = self._members[m].samples
            assert isinstance(samples, PromptSamples), "only a dataset of prompts has prompts"
            prompts.append(samples.get_prompt(index, int(self._offsets[m]) + index))
        return prompts

    def take(self, indices: NDArray[np.int64]) -> Batch:
        """Return the global samples at `indices` (n,)."""
        assert len(indices), "a batch has at least one row"
        rows, sources = [], []
        for m, index in zip(*(part.tolist() for part in self._locate(indices)), strict=True):
            sample = self._members[m].samples.get_rows(index)
            rows += sample
            sources += [self._members[m].source_index] * len(sample)
        return collate(rows, sources)

    def subset(self, name: str) -> "TokenizedDataset":
        """Return a dataset of the member with this name only."""
        return TokenizedDataset(
            [m for m in self._members if m.name == name], self.seq_len, self._seed, self.split
        )

    def evenly_spaced(self, count: int) -> NDArray[np.int64]:
        """Return the indices of `count` samples (or all, if there are fewer) at even distances over
        one pass.
        """
        count = min(count, self.size)
        return np.arange(count) * self.size // max(1, count)

    def iter_batches(self, batch_size: int, max_samples: int | None = None) -> Iterator[Batch]:
        """Yield one pass in batches of `batch_size` samples; with `max_samples`, only that many
        samples, spread evenly.
        """
        indices = self.evenly_spaced(self.size if max_samples is None else max_samples)
        for start in range(0, len(indices), batch_size):
            yield self.take(indices[start : start + batch_size])

    def _range(self, start: int, count: int) -> NDArray[np.int64]:
        stop = start + count if self.split == "train" else min(start + count, self.size)
        return np.arange(start, stop)

    def _locate(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the member (n,) and the index within it (n,) of global samples (n,)."""
        if self.split == "validation":
            members = np.searchsorted(self._offsets, indices, side="right") - 1
            return members, indices - self._offsets[members]
        members, steps = self._mixture.locate(indices)
        local = np.empty_like(steps)
        for m in np.unique(members):
            of_member, member = members == m, self._members[m]
            local[of_member] = order_many(
                self._seed, steps[of_member], member.samples.size, "source", member.source_index
            )
        return members, local


def open_dataset(
    folder: Path,
    data_format: FormatName,
    split: SplitName,
    seq_len: int,
    seed: int,
    *,
    verify: bool = False,
) -> TokenizedDataset:
    """Open one split of a prepared folder as samples of `seq_len` positions.

    Raise UserError if shards are missing or damaged (`verify` compares hashes), or if the split is
    empty.
    """
    report = read_report(folder)
    assert report["data_format"] == data_format, f"{folder} holds {report['data_format']}"
    members = []
    for source_index, entry in enumerate(report["sources"]):
        shards = Shards.open(folder / str(source_index) / split, verify=verify)
        samples = FORMATS[data_format].open(shards, seq_len, verify=verify)
        if samples.size:
            tokens, text_bytes = shards.tokens_total, shards.bytes_total
            members.append(
                DatasetMember(
                    entry["name"], source_index, entry["weight"], samples, tokens, text_bytes
                )
            )
    if not members:
        raise UserError(
            f"data: there is no {split} data; raise data.validation or give more documents"
        )
    return TokenizedDataset(members, seq_len, seed, split)

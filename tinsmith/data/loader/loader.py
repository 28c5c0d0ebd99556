"""What a trainer draws batches from: an endless, seeded, seekable order of rows over one or several
prepared sources.

Sample i of the global order is a pure function of (folder, context, seed, i). Ranks ask for their
own ranges of i, a resumed run asks from the i where it stopped, and nothing has to be replayed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinsmith.core.errors import UserError
from tinsmith.data.config import DataFormat
from tinsmith.data.loader.batch import Batch, collate
from tinsmith.data.loader.mixture import Mixture
from tinsmith.data.loader.order import order_many
from tinsmith.data.loader.pack import ChatRows, DocumentRows, IndexedSamples
from tinsmith.data.prepare.prepared import read_report
from tinsmith.data.prepare.shards import Shards
from tinsmith.data.prompts import METADATA_DIR, Prompt
from tinsmith.data.unpacked import AnswerRows, PairRows, PromptRows

SplitName = Literal["train", "validation"]


class DatasetMember(NamedTuple):
    """One prepared source inside a Source."""

    name: str
    source_index: int
    weight: float
    samples: IndexedSamples
    tokens: int
    bytes: int


class TokenizedDataset:
    """Samples by global number: packed rows of documents or chats, whole chats, pairs (two rows
    each, the chosen answer before the rejected one), or prompts.

    `train` rows come shuffled, every epoch of every member anew, members mixed by weight, without
    end. `validation` rows come once, in order, member after member: there are `size` of them.
    """

    def __init__(self, members: list[DatasetMember], seq_len: int, seed: int, split: SplitName):
        self._members, self._seed, self.seq_len = members, seed, seq_len
        self.split: SplitName = split
        self._mixture = Mixture([member.weight for member in members], seed)
        self._edges = np.cumsum([0, *(member.samples.size for member in members)])

    @property
    def names(self) -> list[str]:
        """The members' names; `Batch.source` counts in the order of the recipe's `data` list."""
        return [member.name for member in self._members]

    @property
    def size(self) -> int:
        """Rows of one pass over all members."""
        return int(self._edges[-1])

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
        """The share of positions that hold a token."""
        return sum(member.samples.num_tokens for member in self._members) / (
            self.size * self.seq_len
        )

    @property
    def num_split_chats(self) -> int:
        """Chats that are longer than a row, and go on in another."""
        return sum(member.samples.num_split_chats for member in self._members)

    @property
    def num_skipped_pieces(self) -> int:
        """Pieces of such chats that are left out because nothing in them is to be learned."""
        return sum(member.samples.num_skipped_pieces for member in self._members)

    def epoch_of(self, index: int) -> float:
        """How many passes over the data lie before global sample `index`."""
        return index / self.size

    def cursors(self, index: int) -> dict[str, int]:
        """How many rows each member has given before global sample `index`."""
        if self.split == "validation":
            given = np.clip(index - self._edges[:-1], 0, np.diff(self._edges))
        else:
            given = self._mixture.cursors(index)
        return dict(zip(self.names, map(int, given), strict=True))

    def get_batch(self, start: int, count: int) -> Batch:
        """The global samples [start, start + count); a validation source ends at `size`."""
        return self.take(self._range(start, count))

    def get_prompts(self, start: int, count: int) -> list[Prompt]:
        """The same, where samples are prompts: each with its answer and its stable number."""
        indices = self._range(start, count)
        found = []
        for m, place in zip(*(part.tolist() for part in self._locate(indices)), strict=True):
            rows = self._members[m].samples
            assert isinstance(rows, PromptRows), "only a source of prompts has prompts"
            found.append(rows.get_prompt(place, int(self._edges[m]) + place))
        return found

    def take(self, indices: NDArray[np.int64]) -> Batch:
        """Any global samples, by number (n,)."""
        assert len(indices), "a batch has at least one row"
        members, places = self._locate(indices)
        rows, sources = [], []
        for m, place in zip(members.tolist(), places.tolist(), strict=True):
            sample = self._members[m].samples.get_rows(place)
            rows += sample
            sources += [self._members[m].source_index] * len(sample)
        return collate(rows, sources)

    def subset(self, name: str) -> "TokenizedDataset":
        """The member of that name alone."""
        return TokenizedDataset(
            [m for m in self._members if m.name == name], self.seq_len, self._seed, self.split
        )

    def evenly_spaced(self, count: int) -> NDArray[np.int64]:
        """`count` row numbers (all, if there are fewer) at even distances over one pass: a fair
        small sample."""
        count = min(count, self.size)
        return np.arange(count) * self.size // max(1, count)

    def iter_batches(self, batch_size: int, max_samples: int | None = None) -> Iterator[Batch]:
        """One pass in batches of at most `rows` samples; with `limit`, over that many samples
        spread evenly."""
        chosen = self.evenly_spaced(self.size if max_samples is None else max_samples)
        for start in range(0, len(chosen), batch_size):
            yield self.take(chosen[start : start + batch_size])

    def _range(self, start: int, count: int) -> NDArray[np.int64]:
        stop = start + count if self.split == "train" else min(start + count, self.size)
        return np.arange(start, stop)

    def _locate(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Member (n,) and row within that member (n,) of global samples (n,)."""
        if self.split == "validation":
            members = np.searchsorted(self._edges, indices, side="right") - 1
            return members, indices - self._edges[members]
        members, numbers = self._mixture.locate(indices)
        places = np.empty_like(numbers)
        for m in np.unique(members):
            here, member = members == m, self._members[m]
            places[here] = order_many(
                self._seed, numbers[here], member.samples.size, "source", member.source_index
            )
        return members, places


_ROWS = {
    "documents": DocumentRows,
    "chats": ChatRows,
    "answers": AnswerRows,
    "pairs": PairRows,
}


def open_dataset(
    folder: Path,
    data_format: DataFormat,
    split: SplitName,
    seq_len: int,
    seed: int,
    *,
    verify: bool = False,
) -> TokenizedDataset:
    """Open what `prepare` wrote to `folder`, as rows of `context` positions.

    Raises UserError where shards are missing or damaged (found by hash with `verify`), and where
    nothing is held back for validation.
    """
    report = read_report(folder)
    assert report["data_format"] == data_format, f"{folder} holds {report['data_format']}"
    members = []
    for number, facts in enumerate(report["sources"]):
        place = folder / str(number) / split
        shards = Shards.open(place, verify=verify)
        rows: IndexedSamples
        if data_format == "prompts":
            rows = PromptRows(shards, Shards.open(place / METADATA_DIR, verify=verify), seq_len)
        else:
            rows = _ROWS[data_format](shards, seq_len)
        if rows.size:
            tokens, text_bytes = shards.tokens_total, shards.bytes_total
            members.append(
                DatasetMember(facts["name"], number, facts["weight"], rows, tokens, text_bytes)
            )
    if not members:
        raise UserError(
            f"data: there is no {split} data; raise data.validation or give more documents"
        )
    return TokenizedDataset(members, seq_len, seed, split)

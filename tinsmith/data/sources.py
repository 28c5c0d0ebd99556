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
from tinsmith.data.batch import Batch, collate
from tinsmith.data.config import Shape
from tinsmith.data.mixture import Mixture
from tinsmith.data.order import order_many
from tinsmith.data.pack import ChatRows, DocumentRows, Packed
from tinsmith.data.prepared import read_report
from tinsmith.data.prompts import NOTES, Prompt
from tinsmith.data.shards import Shards
from tinsmith.data.unpacked import AnswerRows, PairRows, PromptRows

Part = Literal["train", "validation"]


class Member(NamedTuple):
    """One prepared source inside a Source."""

    name: str
    number: int
    weight: float
    rows: Packed
    tokens: int
    bytes: int


class Source:
    """Samples by global number: packed rows of documents or chats, whole chats, pairs (two rows
    each, the chosen answer before the rejected one), or prompts.

    `train` rows come shuffled, every epoch of every member anew, members mixed by weight, without
    end. `validation` rows come once, in order, member after member: there are `size` of them.
    """

    def __init__(self, members: list[Member], context: int, seed: int, part: Part):
        self._members, self._seed, self.context = members, seed, context
        self.part_name: Part = part
        self._mixture = Mixture([member.weight for member in members], seed)
        self._edges = np.cumsum([0, *(member.rows.size for member in members)])

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
    def used(self) -> float:
        """The share of positions that hold a token."""
        return sum(member.rows.positions for member in self._members) / (self.size * self.context)

    @property
    def cut(self) -> int:
        """Chats that are longer than a row, and go on in another."""
        return sum(member.rows.cut for member in self._members)

    @property
    def skipped(self) -> int:
        """Pieces of such chats that are left out because nothing in them is to be learned."""
        return sum(member.rows.skipped for member in self._members)

    def epoch_of(self, index: int) -> float:
        """How many passes over the data lie before global sample `index`."""
        return index / self.size

    def cursors(self, index: int) -> dict[str, int]:
        """How many rows each member has given before global sample `index`."""
        if self.part_name == "validation":
            given = np.clip(index - self._edges[:-1], 0, np.diff(self._edges))
        else:
            given = self._mixture.cursors(index)
        return dict(zip(self.names, map(int, given), strict=True))

    def rows(self, start: int, count: int) -> Batch:
        """The global samples [start, start + count); a validation source ends at `size`."""
        return self.take(self._range(start, count))

    def prompts(self, start: int, count: int) -> list[Prompt]:
        """The same, where samples are prompts: each with its answer and its stable number."""
        indices = self._range(start, count)
        found = []
        for m, place in zip(*(part.tolist() for part in self._locate(indices)), strict=True):
            rows = self._members[m].rows
            assert isinstance(rows, PromptRows), "only a source of prompts has prompts"
            found.append(rows.prompt(place, int(self._edges[m]) + place))
        return found

    def take(self, indices: NDArray[np.int64]) -> Batch:
        """Any global samples, by number (n,)."""
        assert len(indices), "a batch has at least one row"
        members, places = self._locate(indices)
        rows, sources = [], []
        for m, place in zip(members.tolist(), places.tolist(), strict=True):
            sample = self._members[m].rows.sample(place)
            rows += sample
            sources += [self._members[m].number] * len(sample)
        return collate(rows, sources)

    def part(self, name: str) -> "Source":
        """The member of that name alone."""
        return Source(
            [m for m in self._members if m.name == name], self.context, self._seed, self.part_name
        )

    def spread(self, count: int) -> NDArray[np.int64]:
        """`count` row numbers (all, if there are fewer) at even distances over one pass: a fair
        small sample."""
        count = min(count, self.size)
        return np.arange(count) * self.size // max(1, count)

    def pass_through(self, rows: int, limit: int | None = None) -> Iterator[Batch]:
        """One pass in batches of at most `rows` samples; with `limit`, over that many samples
        spread evenly."""
        chosen = self.spread(self.size if limit is None else limit)
        for start in range(0, len(chosen), rows):
            yield self.take(chosen[start : start + rows])

    def _range(self, start: int, count: int) -> NDArray[np.int64]:
        stop = start + count if self.part_name == "train" else min(start + count, self.size)
        return np.arange(start, stop)

    def _locate(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Member (n,) and row within that member (n,) of global samples (n,)."""
        if self.part_name == "validation":
            members = np.searchsorted(self._edges, indices, side="right") - 1
            return members, indices - self._edges[members]
        members, numbers = self._mixture.locate(indices)
        places = np.empty_like(numbers)
        for m in np.unique(members):
            here, member = members == m, self._members[m]
            places[here] = order_many(
                self._seed, numbers[here], member.rows.size, "source", member.number
            )
        return members, places


_ROWS = {
    "documents": DocumentRows,
    "chats": ChatRows,
    "answers": AnswerRows,
    "pairs": PairRows,
}


def open_source(
    folder: Path, shape: Shape, part: Part, context: int, seed: int, *, verify: bool = False
) -> Source:
    """Open what `prepare` wrote to `folder`, as rows of `context` positions.

    Raises UserError where shards are missing or damaged (found by hash with `verify`), and where
    nothing is held back for validation.
    """
    report = read_report(folder)
    assert report["shape"] == shape, f"{folder} holds {report['shape']}"
    members = []
    for number, facts in enumerate(report["sources"]):
        place = folder / str(number) / part
        shards = Shards.open(place, verify=verify)
        rows: Packed
        if shape == "prompts":
            rows = PromptRows(shards, Shards.open(place / NOTES, verify=verify), context)
        else:
            rows = _ROWS[shape](shards, context)
        if rows.size:
            tokens, text_bytes = shards.tokens_total, shards.bytes_total
            members.append(Member(facts["name"], number, facts["weight"], rows, tokens, text_bytes))
    if not members:
        raise UserError(
            f"data: there is no {part} data; raise data.validation or give more documents"
        )
    return Source(members, context, seed, part)

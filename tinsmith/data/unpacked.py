"""Samples that share their rows with nothing: answers, both sides of a pair, prompts. None is
padded; `collate` makes a batch's rows as long as its longest.
"""

import json

import numpy as np
from numpy.typing import NDArray

from tinsmith.data.loader.batch import Row
from tinsmith.data.prepare.shards import Shards
from tinsmith.data.prompts import Prompt


class AnswerRows:
    """Chats by number, one to a row."""

    def __init__(self, shards: Shards, seq_len: int):
        assert shards.masked, "chats carry a mask"
        assert shards.document_lengths.max(initial=0) <= seq_len, (
            "answers were prepared for more context"
        )
        self._shards = shards
        self.size = len(shards.document_starts)
        self.num_tokens = shards.tokens_total
        self.num_split_chats = self.num_skipped_pieces = 0

    def get_rows(self, index: int) -> tuple[Row, ...]:
        """Chat number `place`, not padded."""
        return (_learned(self._shards, index),)


class PairRows:
    """Pairs by number, as two rows each: the chosen answer, then the rejected one."""

    def __init__(self, shards: Shards, seq_len: int):
        assert shards.masked, "pairs carry a mask"
        assert len(shards.document_starts) % 2 == 0, "every pair has two sides"
        assert shards.document_lengths.max(initial=0) <= seq_len, (
            "pairs were prepared for a longer context"
        )
        self._shards = shards
        self.size = len(shards.document_starts) // 2
        self.num_tokens = shards.tokens_total
        self.num_split_chats = self.num_skipped_pieces = 0

    def get_rows(self, index: int) -> tuple[Row, ...]:
        """Both sides of pair number `place`, neither padded."""
        return _learned(self._shards, 2 * index), _learned(self._shards, 2 * index + 1)


class PromptRows:
    """Prompts by number."""

    def __init__(self, shards: Shards, metadata: Shards, seq_len: int):
        assert len(shards.document_starts) == len(metadata.document_starts), (
            "every prompt has a note"
        )
        assert shards.document_lengths.max(initial=0) < seq_len, (
            "prompts were prepared for a longer context"
        )
        self._shards, self._notes = shards, metadata
        self.size = len(shards.document_starts)
        self.num_tokens = shards.tokens_total
        self.num_split_chats = self.num_skipped_pieces = 0

    def get_prompt(self, index: int, prompt_id: int) -> Prompt:
        """Prompt number `place` of these, which the whole source numbers `number`."""
        kept = json.loads(self._notes.tokens(*_span(self._notes, index)).astype(np.uint8).tobytes())
        ids = self._shards.tokens(*_span(self._shards, index)).tolist()
        return Prompt(ids, prompt_id, kept["answer"], kept["record"])

    def get_rows(self, index: int) -> tuple[Row, ...]:
        """The ids of prompt number `place` as a row without targets, not padded."""
        ids = self._shards.tokens(*_span(self._shards, index))
        return (_row(ids, np.zeros_like(ids), np.zeros(len(ids), dtype=bool)),)


def _learned(shards: Shards, document: int) -> Row:
    """A document with its targets, as far as they are to be learned."""
    span = _span(shards, document)
    ids, mask = shards.tokens(*span), shards.mask(*span)
    follows, learned = np.append(ids[1:], 0), np.append(mask[1:], False)
    return _row(ids, np.where(learned, follows, 0), learned)


def _span(shards: Shards, document: int) -> tuple[int, int]:
    """Where a document's tokens begin and end."""
    start = int(shards.document_starts[document])
    return start, start + int(shards.document_lengths[document])


def _row(ids: NDArray[np.int64], targets: NDArray[np.int64], mask: NDArray[np.bool_]) -> Row:
    """A row that is one document."""
    return Row(ids, targets, mask, np.arange(len(ids)), np.zeros_like(ids))

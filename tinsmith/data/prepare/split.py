"""Train and validation split: documents are assigned by a hash of their content, so that equal
documents are in the same part.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tinsmith.data.documents import Document

_NUM_DIGESTS = 2**64


class SourceStats(NamedTuple):
    """Counts of a source, with its smallest and largest document digest."""

    documents: int
    characters: int
    bytes: int
    min_digest: int
    max_digest: int

    @property
    def all_identical(self) -> bool:
        """True if all documents are equal."""
        return self.min_digest == self.max_digest


class Split(NamedTuple):
    """Rule that assigns documents to train or validation: validation if the digest is below
    `threshold`. With `cut_at`, a single document is cut after about that many characters instead.
    """

    threshold: int
    cut_at: int | None = None

    def assign(self, documents: Iterable[Document]) -> Iterator[tuple[bool, Document]]:
        """Yield pairs (is for validation, document). The pieces of a document get the same part."""
        if self.cut_at is not None:
            yield from _cut(documents, self.cut_at)
            return
        is_validation = False
        for document in documents:
            if document.first:
                is_validation = digest(document) < self.threshold
            yield is_validation, document


NO_SPLIT = Split(0)


def plan_split(stats: SourceStats, fraction: float, *, allow_cut: bool) -> Split:
    """Plan the split of a source: about `fraction` of the documents for validation. If two
    documents differ, both parts have at least one.

    With `allow_cut`, a single text is cut in two, so that a single .txt file also has a validation
    part.
    """
    if not fraction:
        return NO_SPLIT
    if stats.all_identical:
        return Split(0, int(stats.characters * (1 - fraction))) if allow_cut else NO_SPLIT
    threshold = int(fraction * _NUM_DIGESTS)
    return Split(min(max(threshold, stats.min_digest + 1), stats.max_digest))


def digest(document: Document) -> int:
    """Return the 64-bit digest of a document's split key, which is by default its content."""
    return int.from_bytes(_digest(document.split_key), "big")


def in_sample(key: bytes, fraction: float) -> bool:
    """Return True if a document with this split key belongs to a random `fraction` of all
    documents. The sample is independent of the split.
    """
    hashed = int.from_bytes(_digest(b"sample" + key), "big")
    return hashed < fraction * _NUM_DIGESTS


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=8).digest()


def _cut(documents: Iterable[Document], cut_at: int) -> Iterator[tuple[bool, Document]]:
    """Cut every copy of the single text after about `cut_at` characters, at the end of a line (or
    else of a word). Yield pairs (is for validation, document).
    """
    offset = 0
    for document in documents:
        text = document.text
        offset = 0 if document.first else offset
        contains_cut = offset < cut_at <= offset + len(text)
        end = _find_line_end(text, cut_at - offset) if contains_cut else 0
        if end:
            yield False, document._replace(content=text[:end], last=True)
            yield True, document._replace(content=text[end:], first=True)
        else:
            yield offset >= cut_at, document
        offset += len(text)


def _find_line_end(text: str, limit: int) -> int:
    """Return the index after the last newline, or else after the last blank, at or before `limit`;
    0 if there is none.
    """
    limit = min(limit, len(text) - 1)
    return (text.rfind("\n", 0, limit) + 1) or (text.rfind(" ", 0, limit) + 1)

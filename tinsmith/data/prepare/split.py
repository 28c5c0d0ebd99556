"""Which documents are held back for validation: a rule on their content, so that equal documents
stay together."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tinsmith.data.documents import Document

_SPAN = 2**64


class SourceStats(NamedTuple):
    """What one reading of a source found out."""

    documents: int
    characters: int
    bytes: int
    min_digest: int
    max_digest: int

    @property
    def all_identical(self) -> bool:
        """Whether all documents are one and the same."""
        return self.min_digest == self.max_digest


class Split(NamedTuple):
    """Documents whose digest is below `threshold` are held back; `cut` instead holds back the end
    of a lone one."""

    threshold: int
    cut_at: int | None = None

    def assign(self, documents: Iterable[Document]) -> Iterator[tuple[bool, Document]]:
        """(whether it is for validation, document) for each; the pieces of a document stay
        together."""
        if self.cut_at is not None:
            yield from _cut(documents, self.cut_at)
            return
        held_back = False
        for document in documents:
            if document.first:
                held_back = digest(document) < self.threshold
            yield held_back, document


NO_SPLIT = Split(0)


def plan_split(stats: SourceStats, fraction: float, *, allow_cut: bool) -> Split:
    """The split of a source: about `fraction` held back, and never nothing where there are two
    different documents.

    A lone text (`may_cut`) is cut in two, so that the usual single file of text has a validation
    part as well.
    """
    if not fraction:
        return NO_SPLIT
    if stats.all_identical:
        return Split(0, int(stats.characters * (1 - fraction))) if allow_cut else NO_SPLIT
    threshold = int(fraction * _SPAN)
    return Split(min(max(threshold, stats.min_digest + 1), stats.max_digest))


def digest(document: Document) -> int:
    """64 bits of a document's key (its content, unless its source says otherwise)."""
    return int.from_bytes(_digest(document.split_key), "big")


def in_sample(document: Document, fraction: float) -> bool:
    """Whether a document belongs to a random `share` of all; has nothing to do with the split."""
    return int.from_bytes(_digest(b"sample" + document.split_key), "big") < fraction * _SPAN


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=8).digest()


def _cut(documents: Iterable[Document], cut: int) -> Iterator[tuple[bool, Document]]:
    """Cut every copy of a lone text after about `cut` characters, at the end of a line (or else of
    a word)."""
    seen = 0
    for document in documents:
        text = document.text
        seen = 0 if document.first else seen
        at = _line_end(text, cut - seen) if seen < cut <= seen + len(text) else 0
        if at:
            yield False, document._replace(content=text[:at], last=True)
            yield True, document._replace(content=text[at:], first=True)
        else:
            yield seen >= cut, document
        seen += len(text)


def _line_end(text: str, before: int) -> int:
    """Where to cut: after the last line's end, else the last blank, at or before `before`; 0 where
    there is none."""
    before = min(before, len(text) - 1)
    return (text.rfind("\n", 0, before) + 1) or (text.rfind(" ", 0, before) + 1)

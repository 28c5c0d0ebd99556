"""Documents -> ids, in batches over all cores, into the shards of one source."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinsmith.data.config import Shape
from tinsmith.data.files import Reject
from tinsmith.data.progress import Progress
from tinsmith.data.shards import ShardWriter
from tinsmith.data.streams import Document
from tinsmith.text.chat import BadRecord, Conversation, encode_chat
from tinsmith.text.tokenizer import Tokenizer

BATCH = 4_000_000
"""Bytes of text encoded at a time."""


class Encoded(NamedTuple):
    """Ids (n,) of a document, for chats which of them are trained (n,), and bytes of its text."""

    ids: list[int]
    mask: list[bool] | None
    text_bytes: int


class Encoder:
    """Writes the documents of one source, each to its side, below `folder`/train and
    `folder`/validation."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shape: Shape):
        self._folder, self._tokenizer, self._shape = folder, tokenizer, shape
        self._byte_lengths = tokenizer.byte_lengths()
        self.rejects: list[Reject] = []

    def write(
        self, documents: Iterable[tuple[bool, Document]], progress: Progress
    ) -> dict[str, dict[str, int]]:
        """Encode and write all of `documents` (whether for validation, document); what went to each
        side."""
        chats = self._shape == "chats"
        with ExitStack() as stack:
            train, validation = (
                stack.enter_context(
                    ShardWriter(self._folder / part, self._tokenizer.vocab_size, masked=chats)
                )
                for part in ("train", "validation")
            )
            for batch in _batches(documents):
                encoded = self._encode([document for _, document in batch])
                for (held_back, document), one in zip(batch, encoded, strict=True):
                    if isinstance(one, Reject):
                        self.rejects.append(one)
                        continue
                    (validation if held_back else train).add(
                        one.ids, one.mask, text_bytes=one.text_bytes, last=document.last
                    )
                progress.advance(sum(document.bytes for _, document in batch))
        return {"train": _counts(train), "validation": _counts(validation)}

    def _encode(self, documents: list[Document]) -> Sequence[Encoded | Reject]:
        """Texts of a batch at once, conversations one by one."""
        if any(isinstance(document.content, Conversation) for document in documents):
            return [self._chat(document) for document in documents]
        whole = iter(
            self._tokenizer.encode_many(document.text for document in documents if document.first)
        )
        end = [self._tokenizer.end_of_text]
        encoded = []
        for document in documents:
            ids = next(whole) if document.first else self._tokenizer.encode_inside(document.text)
            encoded.append(Encoded(ids + end * document.last, None, document.bytes))
        return encoded

    def _chat(self, document: Document) -> Encoded | Reject:
        assert isinstance(document.content, Conversation)
        try:
            ids, mask = encode_chat(self._tokenizer, document.content)
        except BadRecord as error:
            return Reject(document.file, document.line, str(error))
        if self._shape == "chats" and not any(mask[1:]):
            return Reject(document.file, document.line, "nothing in it is to be learned")
        text_bytes = int(self._byte_lengths[np.asarray(ids)].sum())
        if self._shape == "documents":
            return Encoded([*ids, self._tokenizer.end_of_text], None, text_bytes)
        return Encoded(ids, mask, text_bytes)


def _batches(documents: Iterable[tuple[bool, Document]]) -> Iterator[list[tuple[bool, Document]]]:
    batch: list[tuple[bool, Document]] = []
    length = 0
    for item in documents:
        batch.append(item)
        length += item[1].bytes
        if length >= BATCH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _counts(writer: ShardWriter) -> dict[str, Any]:
    return {"documents": writer.documents, "tokens": writer.tokens, "bytes": writer.bytes}

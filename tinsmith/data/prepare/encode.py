"""Documents -> ids, in batches over all cores, into the shards of one source."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinsmith.core.progress import Progress
from tinsmith.data.arc.encoding import ArcExample, check_grid_tokenizer, encode_example
from tinsmith.data.config import DataFormat
from tinsmith.data.documents import Document
from tinsmith.data.files import Reject
from tinsmith.data.pairs import PreferencePair, encode_pair
from tinsmith.data.prepare.shards import ShardWriter
from tinsmith.data.prompts import (
    METADATA_DIR,
    PromptExample,
    encode_metadata,
    encode_prompt_example,
)
from tinsmith.text.chat import BadRecord, Conversation, encode_chat
from tinsmith.text.tokenizer import Tokenizer

BATCH_BYTES = 4_000_000
"""Bytes of text encoded at a time."""


MASKED_FORMATS: tuple[DataFormat, ...] = ("chats", "answers", "pairs")
"""Shapes that say of every token whether it is trained."""


class EncodedDocument(NamedTuple):
    """Ids (n,) of a document, for chats and pairs which of them are trained (n,), bytes of its
    text, and for prompts what else is known."""

    ids: list[int]
    mask: list[bool] | None
    text_bytes: int
    metadata: bytes | None = None


class DocumentEncoder:
    """Writes the documents of one source, each to its side, below `folder`/train and
    `folder`/validation."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, data_format: DataFormat, seq_len: int = 0
    ):
        self._folder, self._tokenizer = folder, tokenizer
        self._shape: DataFormat = data_format
        self._context = seq_len
        self._byte_lengths = tokenizer.byte_lengths()
        self.rejects: list[Reject] = []

    def write(
        self, documents: Iterable[tuple[bool, Document]], progress: Progress
    ) -> dict[str, dict[str, int]]:
        """Encode and write all of `documents` (whether for validation, document); what went to each
        side."""
        with ExitStack() as stack:
            train, validation = (
                _Side(self._folder / part, self._tokenizer.vocab_size, self._shape, stack)
                for part in ("train", "validation")
            )
            for batch in _batches(documents):
                encoded = self._encode([document for _, document in batch])
                for (held_back, document), one in zip(batch, encoded, strict=True):
                    if isinstance(one, Reject):
                        self.rejects.append(one)
                        continue
                    (validation if held_back else train).add(one, last=document.last)
                progress.advance(sum(document.bytes for _, document in batch))
        return {"train": train.counts(), "validation": validation.counts()}

    def _encode(self, documents: list[Document]) -> Sequence[Sequence[EncodedDocument] | Reject]:
        """Texts of a batch at once, anything else one by one."""
        if not all(isinstance(document.content, str) for document in documents):
            return [self._one(document) for document in documents]
        whole = iter(
            self._tokenizer.encode_many(document.text for document in documents if document.first)
        )
        end = [self._tokenizer.end_of_text]
        encoded = []
        for document in documents:
            ids = next(whole) if document.first else self._tokenizer.encode_inside(document.text)
            encoded.append([EncodedDocument(ids + end * document.last, None, document.bytes)])
        return encoded

    def _one(self, document: Document) -> Sequence[EncodedDocument] | Reject:
        content = document.content
        try:
            if isinstance(content, PreferencePair):
                sides = encode_pair(self._tokenizer, content, self._context)
                return [EncodedDocument(*side, self._bytes(side.ids)) for side in sides]
            if isinstance(content, PromptExample):
                ids = encode_prompt_example(self._tokenizer, content, self._context)
                return [EncodedDocument(ids, None, self._bytes(ids), encode_metadata(content))]
            if isinstance(content, ArcExample):
                return [self._example(content)]
            assert isinstance(content, Conversation)
            return [self._chat(content)]
        except BadRecord as error:
            return Reject(document.file, document.line, str(error))

    def _chat(self, conversation: Conversation) -> EncodedDocument:
        ids, mask = encode_chat(self._tokenizer, conversation)
        if self._shape == "documents":
            return EncodedDocument([*ids, self._tokenizer.end_of_text], None, self._bytes(ids))
        if not any(mask[1:]):
            raise BadRecord("nothing in it is to be learned")
        return self._whole(EncodedDocument(ids, mask, self._bytes(ids)))

    def _example(self, example: ArcExample) -> EncodedDocument:
        check_grid_tokenizer(self._tokenizer)
        ids, mask = encode_example(example)
        learned = None if self._shape == "documents" else mask
        return self._whole(EncodedDocument(ids, learned, self._bytes(ids)))

    def _whole(self, encoded: EncodedDocument) -> EncodedDocument:
        """The same, where an answer is never without its prompt; BadRecord where it has no room."""
        if self._shape == "answers" and len(encoded.ids) > self._context:
            size = f"{len(encoded.ids)} tokens are beyond the context of {self._context}"
            raise BadRecord(f"{size}, and what is to be answered is never cut off")
        return encoded

    def _bytes(self, ids: list[int]) -> int:
        return int(self._byte_lengths[np.asarray(ids)].sum())


class _Side:
    """The shards of one side of a source, open until the stack is left."""

    def __init__(self, folder: Path, vocab_size: int, shape: DataFormat, stack: ExitStack):
        self._runs = stack.enter_context(
            ShardWriter(folder, vocab_size, masked=shape in MASKED_FORMATS)
        )
        self._notes = None
        if shape == "prompts":
            self._notes = stack.enter_context(ShardWriter(folder / METADATA_DIR, 256))
        self._each = 2 if shape == "pairs" else 1

    def add(self, runs: Sequence[EncodedDocument], *, last: bool) -> None:
        """Append a document: one run of ids, or the two of a pair."""
        for run in runs:
            self._runs.add(run.ids, run.mask, text_bytes=run.text_bytes, last=last)
            if self._notes is not None and run.metadata is not None:
                self._notes.add(np.frombuffer(run.metadata, dtype=np.uint8))

    def counts(self) -> dict[str, Any]:
        """Documents (chats, pairs, prompts), tokens, bytes of text."""
        runs = self._runs
        documents = runs.documents // self._each
        return {"documents": documents, "tokens": runs.tokens, "bytes": runs.bytes}


def _batches(documents: Iterable[tuple[bool, Document]]) -> Iterator[list[tuple[bool, Document]]]:
    batch: list[tuple[bool, Document]] = []
    length = 0
    for item in documents:
        batch.append(item)
        length += item[1].bytes
        if length >= BATCH_BYTES:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch

"""Encode documents in batches over all cores, into the shards of one source."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from tinsmith.core.errors import UserError
from tinsmith.core.progress import Progress
from tinsmith.data.documents import Document
from tinsmith.data.files import Reject
from tinsmith.data.formats.base import DataFormat, EncodedSequence
from tinsmith.data.formats.prompts import METADATA_DIR
from tinsmith.data.prepare.shards import ShardWriter
from tinsmith.text.tokenizer import Tokenizer

BATCH_BYTES = 4_000_000
"""Bytes of text that are encoded at a time."""


class DocumentEncoder:
    """Writes the documents of one source below `folder`/train and `folder`/validation."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, data_format: DataFormat, seq_len: int = 0
    ):
        self._folder, self._tokenizer = folder, tokenizer
        self._data_format, self._seq_len = data_format, seq_len
        self._byte_lengths = tokenizer.byte_lengths()
        self.rejects: list[Reject] = []

    def write(
        self, documents: Iterable[tuple[bool, Document]], progress: Progress
    ) -> dict[str, dict[str, int]]:
        """Encode and write `documents`, pairs of (is for validation, document). Return the counts
        of both splits.
        """
        with ExitStack() as stack:
            train, validation = (
                _SplitWriter(
                    self._folder / split, self._tokenizer.vocab_size, self._data_format, stack
                )
                for split in ("train", "validation")
            )
            for batch in _batches(documents):
                encoded = self._encode_batch([document for _, document in batch])
                for (held_back, document), sequences in zip(batch, encoded, strict=True):
                    writer = validation if held_back else train
                    if isinstance(sequences, Reject):
                        self.rejects.append(sequences)
                        if document.last and not document.first:
                            (ending,) = self._delimited([], document)
                            writer.add(ending, 0, last=True)
                        continue
                    for sequence in sequences:
                        text_bytes = document.bytes if document.is_text else self._bytes(sequence)
                        writer.add(sequence, text_bytes, last=document.last)
                progress.advance(sum(document.bytes for _, document in batch))
        return {"train": train.counts(), "validation": validation.counts()}

    def _encode_batch(
        self, documents: list[Document]
    ) -> Sequence[Sequence[EncodedSequence] | Reject]:
        """Encode texts of a batch together, anything else one by one. A document that cannot be
        encoded becomes a Reject.
        """
        if not all(document.is_text for document in documents):
            return [self._encode_one(document) for document in documents]
        try:
            first_pieces = iter(
                self._tokenizer.encode_many(
                    document.text for document in documents if document.first
                )
            )
        except UserError:  # one by one, to find the documents that the vocabulary cannot represent
            return [self._encode_text(document) for document in documents]
        return [
            self._delimited(next(first_pieces), document)
            if document.first
            else self._encode_text(document)
            for document in documents
        ]

    def _encode_one(self, document: Document) -> Sequence[EncodedSequence] | Reject:
        if document.is_text:
            return self._encode_text(document)
        try:
            return self._data_format.encode(document.content, self._tokenizer, self._seq_len)
        except UserError as error:
            return Reject(document.file, document.line, str(error))

    def _encode_text(self, document: Document) -> Sequence[EncodedSequence] | Reject:
        encode = self._tokenizer.encode if document.first else self._tokenizer.encode_inside
        try:
            return self._delimited(encode(document.text), document)
        except UserError as error:
            return Reject(document.file, document.line, str(error))

    def _delimited(self, ids: list[int], document: Document) -> list[EncodedSequence]:
        """Return the ids of a text, with the tokenizer's prefix (BOS) before its first piece and
        the end-of-text token after its last one.
        """
        prefix = self._tokenizer.prefix * document.first
        return [EncodedSequence(prefix + ids + [self._tokenizer.end_of_text] * document.last, None)]

    def _bytes(self, sequence: EncodedSequence) -> int:
        return int(self._byte_lengths[np.asarray(sequence.ids)].sum())


class _SplitWriter:
    """The shards of one split of a source, open until the stack is left."""

    def __init__(self, folder: Path, vocab_size: int, data_format: DataFormat, stack: ExitStack):
        self._shards = stack.enter_context(
            ShardWriter(folder, vocab_size, masked=data_format.masked)
        )
        self._metadata = None
        if data_format.has_metadata:
            self._metadata = stack.enter_context(ShardWriter(folder / METADATA_DIR, 256))
        self._sequences_per_sample = data_format.sequences_per_sample

    def add(self, sequence: EncodedSequence, text_bytes: int, *, last: bool) -> None:
        self._shards.add(sequence.ids, sequence.mask, text_bytes=text_bytes, last=last)
        if self._metadata is not None and sequence.metadata is not None:
            self._metadata.add(np.frombuffer(sequence.metadata, dtype=np.uint8))

    def counts(self) -> dict[str, Any]:
        """Return the number of samples, tokens and bytes of text."""
        samples = self._shards.documents // self._sequences_per_sample
        return {"documents": samples, "tokens": self._shards.tokens, "bytes": self._shards.bytes}


def _batches(documents: Iterable[tuple[bool, Document]]) -> Iterator[list[tuple[bool, Document]]]:
    batch: list[tuple[bool, Document]] = []
    num_bytes = 0
    for item in documents:
        batch.append(item)
        num_bytes += item[1].bytes
        if num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch

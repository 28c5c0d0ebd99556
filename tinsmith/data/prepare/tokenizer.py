"""The tokenizer of prepared data: given, loaded, or trained on the training split."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from tinsmith.core.progress import Progress
from tinsmith.data.documents import Document
from tinsmith.data.prepare.split import in_sample
from tinsmith.text.bpe import train_bpe
from tinsmith.text.config import TokenizerConfig, TrainTokenizerConfig
from tinsmith.text.grid_vocab import grid_tokenizer
from tinsmith.text.tokenizer import Tokenizer

_MIN_PIECES = 16
"""Longer documents than this fraction of a sample are sampled in pieces."""


def load_tokenizer_or_config(
    tokenizer: TokenizerConfig | TrainTokenizerConfig | Tokenizer,
) -> Tokenizer | TrainTokenizerConfig:
    """Return the tokenizer, loaded if a path names it, or the config to train it with."""
    if isinstance(tokenizer, Tokenizer | TrainTokenizerConfig):
        return tokenizer
    if tokenizer.path:
        return Tokenizer.load(tokenizer.path)
    if tokenizer.symbols:
        return grid_tokenizer()
    return tokenizer.train or TrainTokenizerConfig()


def tokenizer_fingerprint(tokenizer: Tokenizer | TrainTokenizerConfig) -> Any:
    """Return plain data that changes when texts are encoded differently."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.fingerprint()
    return [tokenizer.vocab_size, tokenizer.max_bytes]


def train_tokenizer(
    settings: TrainTokenizerConfig,
    documents: Iterable[tuple[bool, Document]],
    total_bytes: int,
    progress: Progress,
) -> tuple[Tokenizer, int]:
    """Train a BPE on a sample of the training documents. `documents` are pairs of (is for
    validation, document). Return the tokenizer and the number of bytes it was trained on.

    The sample is spread evenly over all `total_bytes` of text, has at most `max_bytes`, and is
    empty only if there is nothing to train on.
    """
    sample = _sample(documents, settings.max_bytes, settings.max_bytes / total_bytes, progress)
    return train_bpe(sample.texts, settings.vocab_size), sample.bytes


class _Piece(NamedTuple):
    """Texts that belong to a sample together."""

    key: bytes
    texts: list[str]
    bytes: int


def _sample(
    documents: Iterable[tuple[bool, Document]], max_bytes: int, fraction: float, progress: Progress
) -> _Piece:
    """Return the sampled texts, or else the first piece."""
    piece_bytes = max(1, max_bytes // _MIN_PIECES) if fraction < 1 else max_bytes
    first: _Piece | None = None
    texts: list[str] = []
    num_bytes = 0
    for is_validation, document in documents:
        progress.advance(document.bytes)
        for piece in () if is_validation else _pieces(document, piece_bytes):
            first = first or piece
            if fraction < 1 and not in_sample(piece.key, fraction):
                continue
            if num_bytes and num_bytes + piece.bytes > max_bytes:
                return _Piece(b"", texts, num_bytes)
            num_bytes += piece.bytes
            texts += piece.texts
    return _Piece(b"", texts, num_bytes) if texts else first or _Piece(b"", [], 0)


def _pieces(document: Document, max_bytes: int) -> Iterator[_Piece]:
    """Yield a document, or pieces of its texts if it is longer than `max_bytes`."""
    texts = document.tokenizer_texts()
    if document.bytes <= max_bytes:
        yield _Piece(document.split_key, texts, document.bytes)
        return
    key = hashlib.blake2b(document.split_key).digest()
    chars = max(1, max_bytes // 4)  # a character has at most four bytes
    cuts = (text[start : start + chars] for text in texts for start in range(0, len(text), chars))
    for index, cut in enumerate(cuts):
        yield _Piece(key + str(index).encode(), [cut], len(cut.encode()))

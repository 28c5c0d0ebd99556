"""The tokenizer of prepared data: given, loaded, or trained on the training split."""

from collections.abc import Iterable, Iterator
from typing import Any

from tinsmith.core.progress import Progress
from tinsmith.data.documents import Document
from tinsmith.data.prepare.split import in_sample
from tinsmith.text.bpe import train_bpe
from tinsmith.text.config import TokenizerConfig, TrainTokenizerConfig
from tinsmith.text.grid_vocab import grid_tokenizer
from tinsmith.text.tokenizer import Tokenizer


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
) -> Tokenizer:
    """Train a BPE on a sample of the training documents. `documents` are pairs of (is for
    validation, document).

    The sample is spread evenly over all `total_bytes` of text, and has at most `max_bytes`.
    """
    sample = _sample(documents, settings.max_bytes, settings.max_bytes / total_bytes, progress)
    return train_bpe(sample, settings.vocab_size)


def _sample(
    documents: Iterable[tuple[bool, Document]], max_bytes: int, fraction: float, progress: Progress
) -> Iterator[str]:
    num_bytes = 0
    for is_validation, document in documents:
        progress.advance(document.bytes)
        if is_validation or (fraction < 1 and not in_sample(document, fraction)):
            continue
        if num_bytes and num_bytes + document.bytes > max_bytes:
            return
        num_bytes += document.bytes
        yield from document.tokenizer_texts()

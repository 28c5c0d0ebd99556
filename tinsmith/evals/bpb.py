"""Evaluate cross-entropy per token and bits per byte on tokenized rows or on text files.

    loss = sum of -ln p(target) / targets                        (nats per token)
    bpb  = sum of -ln p(target) / (ln 2 * bytes of the targets)  (bits per byte)

Bits per byte do not depend on the tokenizer, so models with different tokenizers can be compared.
Targets that stand for no bytes (`<|endoftext|>` and other special tokens) count for the loss and
not for bits per byte.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinsmith.core.errors import UserError
from tinsmith.data import files
from tinsmith.data.files import Reject
from tinsmith.data.loader.batch import Batch
from tinsmith.data.loader.loader import TokenizedDataset
from tinsmith.data.sources.base import unique_names
from tinsmith.evals.sliding_window import TextReader, pack_windows, sliding_windows
from tinsmith.infer.generate import eval_mode
from tinsmith.losses.logprobs import token_nll
from tinsmith.nn.model import LM
from tinsmith.text.tokenizer import Tokenizer

ALL = "all"
MAX_DEFAULT_SEQ_LEN = 1024
"""Default length of a window in tokens, if the model's maximum is larger."""


class Bpb(NamedTuple):
    """Sums over targets, and the means computed from them."""

    nll: float
    """Sum over all targets, in nats."""
    tokens: int
    text_nll: float
    """Sum over the targets that stand for bytes, in nats."""
    bytes: int

    @property
    def loss(self) -> float:
        """Cross-entropy in nats per token; NaN without tokens."""
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def bpb(self) -> float:
        """Bits per byte; NaN without bytes."""
        return self.text_nll / (math.log(2) * self.bytes) if self.bytes else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON-ready data, except for NaN."""
        return {"bpb": self.bpb, "loss": self.loss, "tokens": self.tokens, "bytes": self.bytes}


class TextResult(NamedTuple):
    """The result of `evaluate_text`."""

    parts: dict[str, Bpb]
    """Results by file name, and `all`."""
    documents: int
    rejected: int
    """Number of skipped lines."""
    seq_len: int
    stride: int

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON-ready data, except for NaN."""
        return self._asdict() | {"parts": {key: bpb.to_dict() for key, bpb in self.parts.items()}}


@torch.no_grad()
def evaluate_bpb(
    lm: LM,
    source: TokenizedDataset,
    byte_lengths: Tensor,
    *,
    max_samples: int,
    batch_size: int,
    device: torch.device | str,
    poll: Callable[[], object],
) -> dict[str, Bpb]:
    """Return results by source name, and `all`, from at most `max_samples` rows spread over
    `source`.

    `byte_lengths` (V,) int64 are the bytes of text of each id. `poll` is called before every batch
    and may raise to end the evaluation. No global random state is used, and the model's modes are
    restored.
    """
    lengths = byte_lengths.cpu()
    names = {int(source.subset(name).get_batch(0, 1).source[0]): name for name in source.names}
    sums = _Sums(1 + max(names))
    with eval_mode(lm):
        for batch in source.iter_batches(batch_size, max_samples=max_samples):
            poll()
            sums.add(lm, batch, lengths, device)
    return sums.results(names)


@torch.no_grad()
def evaluate_text(
    lm: LM,
    tokenizer: Tokenizer,
    path: Path | str,
    *,
    seq_len: int | None = None,
    stride: int | None = None,
    field: str = "text",
    limit: int | None = None,
    batch_size: int = 8,
    poll: Callable[[], object] = lambda: None,
    say: Callable[[str], None] = lambda line: None,
) -> TextResult:
    """Return bits per byte of a .txt, .jsonl, .jsonl.gz or .parquet file, or of a folder of them.

    Documents are split into windows of `seq_len` inputs, `stride` apart (default: `seq_len`). Every
    token of a document except the first is predicted exactly once; overlapping windows (`stride` <
    `seq_len`) cost more, and give every token a longer context. `field` holds the text of a record;
    `limit` is the largest number of documents of each file. Unusable lines are skipped, counted and
    reported by `say`.

    Raises UserError if there is nothing to read or a size is invalid for the model.
    """
    check_limit(limit)
    seq_len, stride = _check_sizes(lm, seq_len, stride)
    paths = files.find_files(str(path), "data")
    names = dict(enumerate(unique_names([file.name for file in paths])))
    lengths = torch.from_numpy(tokenizer.byte_lengths())
    sums, device = _Sums(len(names)), lm.embed.weight.device
    readers = [TextReader(file, field, limit) for file in paths]
    with eval_mode(lm):
        for source_id, reader in enumerate(readers):
            windows = sliding_windows(reader, tokenizer, seq_len, stride)
            for batch in pack_windows(windows, seq_len, batch_size, source_id):
                poll()
                sums.add(lm, batch, lengths, device)
    documents = sum(reader.documents for reader in readers)
    rejects = [reject for reader in readers for reject in reader.rejects]
    report_rejects(f"{path}", "text", documents, rejects, say)
    return TextResult(sums.results(names), documents, len(rejects), seq_len, stride)


def check_limit(limit: int | None) -> None:
    """Raise UserError for a limit below 1."""
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} must be at least 1")


def report_rejects(
    path: str, what: str, usable: int, rejects: list[Reject], say: Callable[[str], None]
) -> None:
    """Report skipped lines; UserError if no line was usable."""
    first_reason = (
        f"{rejects[0].file}:{rejects[0].line}: {rejects[0].reason}" if rejects else "it is empty"
    )
    if not usable:
        raise UserError(f"{path}: no {what} in it can be used; {first_reason}")
    if rejects:
        say(f" warning {path}: {len(rejects)} lines skipped, the first is {first_reason}")


class _Sums:
    """Sums by source id, in float64 on the CPU."""

    def __init__(self, num_sources: int):
        self._sums = torch.zeros(4, num_sources, dtype=torch.float64)

    def add(self, lm: LM, batch: Batch, byte_lengths: Tensor, device: torch.device | str) -> None:
        """Evaluate one batch and add its sums."""
        on_device = batch.to(device)
        hidden = lm(on_device.ids, on_device.positions, on_device.segments, logits=False).hidden
        nll = (
            token_nll(hidden[on_device.mask], on_device.targets[on_device.mask], lm.head)
            .cpu()
            .double()
        )
        source_ids = batch.source[:, None].expand_as(batch.mask)[batch.mask]
        num_bytes = byte_lengths[batch.targets[batch.mask]].double()
        values = (nll, torch.ones_like(nll), nll.where(num_bytes > 0, 0), num_bytes)
        for sums, value in zip(self._sums, values, strict=True):
            sums += torch.bincount(source_ids, value, len(sums))

    def results(self, names: dict[int, str]) -> dict[str, Bpb]:
        """Return the results by name."""
        columns = {name: self._sums[:, source_id] for source_id, name in names.items()}
        columns[ALL] = self._sums.sum(1)
        return {name: _bpb(*column.tolist()) for name, column in columns.items()}


def _bpb(nll: float, tokens: float, text_nll: float, size: float) -> Bpb:
    return Bpb(nll, int(tokens), text_nll, int(size))


def _check_sizes(lm: LM, seq_len: int | None, stride: int | None) -> tuple[int, int]:
    max_seq_len = lm.config.max_seq_len
    seq_len = min(max_seq_len, MAX_DEFAULT_SEQ_LEN) if seq_len is None else seq_len
    if not 1 <= seq_len <= max_seq_len:
        raise UserError(
            f"seq_len: {seq_len} must be from 1 to the model's max_seq_len of {max_seq_len}"
        )
    stride = seq_len if stride is None else stride
    if not 1 <= stride <= seq_len:
        raise UserError(f"stride: {stride} must be from 1 to seq_len={seq_len}")
    return seq_len, stride

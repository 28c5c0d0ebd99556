"""Cross-entropy per token and bits per byte, over prepared rows or over text files.

    loss = sum of -ln p(target) / targets                        (nats per token)
    bpb  = sum of -ln p(target) / (ln 2 * bytes of the targets)  (bits per byte)

Bits per byte do not depend on the tokenizer, so models with different ones can be compared. Targets
that stand for no bytes (`<|endoftext|>` and its like) count for the loss and not for bits per byte.
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
"""Tokens of a window where nobody says otherwise and the model could take more."""


class Bpb(NamedTuple):
    """Sums over targets, and the two means made of them."""

    nll: float
    """Nats, over all targets."""
    tokens: int
    text_nll: float
    """Nats, over the targets that stand for bytes."""
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token; NaN without a token."""
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def bpb(self) -> float:
        """Bits per byte; NaN without a byte."""
        return self.text_nll / (math.log(2) * self.bytes) if self.bytes else math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready but for NaN."""
        return {"bpb": self.bpb, "loss": self.loss, "tokens": self.tokens, "bytes": self.bytes}


class TextResult(NamedTuple):
    """What `evaluate_text` found."""

    parts: dict[str, Bpb]
    """By file name, and `all`."""
    documents: int
    rejected: int
    """Lines left out."""
    seq_len: int
    stride: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready but for NaN."""
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
    """By source name, and `all`: one pass over at most `rows` rows, spread evenly over `source`.

    `byte_lengths` (V,) int64: bytes of text of each id. `poll` is called before every batch and may
    raise to end it. No global random state is touched and the model's modes are as before.
    """
    lengths = byte_lengths.cpu()
    names = {int(source.subset(name).get_batch(0, 1).source[0]): name for name in source.names}
    tally = _Tally(1 + max(names))
    with eval_mode(lm):
        for batch in source.iter_batches(batch_size, max_samples=max_samples):
            poll()
            tally.add(lm, batch, lengths, device)
    return tally.results(names)


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
    """Bits per byte of a .txt, .jsonl, .jsonl.gz or .parquet file, or of a folder of them.

    Documents are cut into windows of `context` inputs, `stride` apart (default: as long as the
    window). Every token of a document but the first is predicted exactly once; windows that overlap
    (`stride` < `context`) cost more and leave no token with little before it. `field` holds the
    text of a row; `limit`: so many documents of each file. Lines that cannot be used are left out,
    counted and told to `say`.

    Raises UserError where there is nothing to read or a size does not fit the model.
    """
    check_limit(limit)
    seq_len, stride = _sizes(lm, seq_len, stride)
    found = files.find_files(str(path), "data")
    names = dict(enumerate(unique_names([file.name for file in found])))
    lengths = torch.from_numpy(tokenizer.byte_lengths())
    tally, device = _Tally(len(names)), lm.embed.weight.device
    readers = [TextReader(file, field, limit) for file in found]
    with eval_mode(lm):
        for number, reader in enumerate(readers):
            cut = sliding_windows(reader, tokenizer, seq_len, stride)
            for batch in pack_windows(cut, seq_len, batch_size, number):
                poll()
                tally.add(lm, batch, lengths, device)
    documents = sum(reader.documents for reader in readers)
    rejects = [reject for reader in readers for reject in reader.rejects]
    report_rejects(f"{path}", "text", documents, rejects, say)
    return TextResult(tally.results(names), documents, len(rejects), seq_len, stride)


def check_limit(limit: int | None) -> None:
    """UserError for a limit that lets nothing through."""
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} must be at least 1")


def report_rejects(
    path: str, what: str, usable: int, rejects: list[Reject], say: Callable[[str], None]
) -> None:
    """Tell of lines that were left out; UserError where nothing else was there."""
    first = (
        f"{rejects[0].file}:{rejects[0].line}: {rejects[0].reason}" if rejects else "it is empty"
    )
    if not usable:
        raise UserError(f"{path}: no {what} in it can be used; {first}")
    if rejects:
        say(f" warning {path}: {len(rejects)} lines left out, the first is {first}")


class _Tally:
    """Sums by the number of a batch's source, in float64 on the CPU."""

    def __init__(self, groups: int):
        self._sums = torch.zeros(4, groups, dtype=torch.float64)

    def add(self, lm: LM, batch: Batch, byte_lengths: Tensor, device: torch.device | str) -> None:
        """Run one batch."""
        here = batch.to(device)
        hidden = lm(here.ids, here.positions, here.segments, logits=False).hidden
        nll = token_nll(hidden[here.mask], here.targets[here.mask], lm.head).cpu().double()
        group = batch.source[:, None].expand_as(batch.mask)[batch.mask]
        size = byte_lengths[batch.targets[batch.mask]].double()
        values = (nll, torch.ones_like(nll), nll.where(size > 0, 0), size)
        for sums, value in zip(self._sums, values, strict=True):
            sums += torch.bincount(group, value, len(sums))

    def results(self, names: dict[int, str]) -> dict[str, Bpb]:
        """What was gathered, by name."""
        columns = {name: self._sums[:, number] for number, name in names.items()}
        columns[ALL] = self._sums.sum(1)
        return {name: _bpb(*column.tolist()) for name, column in columns.items()}


def _bpb(nll: float, tokens: float, text_nll: float, size: float) -> Bpb:
    return Bpb(nll, int(tokens), text_nll, int(size))


def _sizes(lm: LM, context: int | None, stride: int | None) -> tuple[int, int]:
    most = lm.config.max_seq_len
    context = min(most, MAX_DEFAULT_SEQ_LEN) if context is None else context
    if not 1 <= context <= most:
        raise UserError(f"context: {context} must be from 1 to the model's max_seq_len of {most}")
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise UserError(f"stride: {stride} must be from 1 to the context of {context}")
    return context, stride

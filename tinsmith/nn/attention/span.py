"""Attention spans, and documents of packed batches: which keys each query attends to.

A document is a run of one segment id in one row. A query attends to the keys of its own document up
to itself, or to the last `window` of them. These keys are consecutive, so a pair of numbers per
query describes them, and (T, S) masks are built only where a kernel needs one. Causality, windows,
packed documents, padding and caches are all expressed as spans, and every query has at least one
key.

`LM.forward` computes the spans of a batch once, and all layers share them (`Ctx.span`).

Legend: B rows, T queries or tokens, S keys, N tokens without padding.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

INF = 2**30


class Span(NamedTuple):
    """Query t of row b attends to the keys whose position in the row is in [low, high].

    If all fields are None, the T queries are the last T keys and attention is causal.
    """

    low_BT: Tensor | None = None
    high_BT: Tensor | None = None
    key_positions_BS: Tensor | None = None
    """Position of each key in its row, negative for an empty slot. None: keys are in order and
    begin at position 0.
    """
    aligned: bool = False
    """True if queries and keys are the same tokens, so that no query attends to a later key. Known
    without reading `high_BT` from the device.
    """

    @property
    def is_causal(self) -> bool:
        """True if the only restriction is causality."""
        return self.high_BT is None and self.key_positions_BS is None

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Low and high of a span that has both."""
        assert self.low_BT is not None
        assert self.high_BT is not None
        return self.low_BT, self.high_BT

    def num_visible_keys(self, stop: int, queries: int, keys: int) -> int:
        """Return how many of the first keys the queries before `stop` can attend to."""
        return keys - queries + stop if self.is_causal or self.aligned else keys

    def materialize(self, batch_size: int, queries: int, keys: int, device: torch.device) -> "Span":
        """Return the same span with low and high as tensors (B, T)."""
        high = self.high_BT
        if high is None:
            high = torch.arange(keys - queries, keys, device=device)[None]
        low = torch.zeros_like(high) if self.low_BT is None else self.low_BT
        return Span(low.expand(batch_size, -1), high.expand(batch_size, -1), self.key_positions_BS)

    def slice_queries(self, queries: slice) -> "Span":
        """Return the span of some of the queries; it must have low and high."""
        low_BT, high_BT = self.bounds
        return Span(low_BT[:, queries], high_BT[:, queries], self.key_positions_BS)

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Return the attention mask (B or 1, T, S), True where a query attends to a key."""
        if self.key_positions_BS is None:
            positions = torch.arange(keys, device=device)[None, None]
        else:
            positions = self.key_positions_BS[:, None]
        if self.high_BT is None:
            return positions <= torch.arange(keys - queries, keys, device=device)[None, :, None]
        mask_BTS = positions <= self.high_BT[..., None]
        return mask_BTS if self.low_BT is None else mask_BTS & (positions >= self.low_BT[..., None])


def is_document_start(segments_BT: Tensor) -> Tensor:
    """Return (B, T) bool: True for the first token of each run of equal segment ids."""
    starts_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    starts_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return starts_BT


def document_starts(segments_BT: Tensor) -> Tensor:
    """Return (B, T): the index of the first token of the document of each token."""
    index = torch.arange(segments_BT.shape[1], device=segments_BT.device).expand_as(segments_BT)
    return torch.where(is_document_start(segments_BT), index, 0).cummax(1).values


def attention_spans(
    segments_BT: Tensor | None, length: int, windows: Iterable[int | None], device: torch.device
) -> dict[int | None, Span]:
    """Return the spans of `length` tokens that attend to each other, by window; None attends to the
    whole document up to the query.
    """
    starts_BT = None if segments_BT is None else document_starts(segments_BT)
    return {window: _span(starts_BT, length, window, device) for window in windows}


def attention_span(
    segments_BT: Tensor | None, length: int, window: int | None, device: torch.device
) -> Span:
    """Return the span of one window, as `attention_spans` does."""
    return attention_spans(segments_BT, length, (window,), device)[window]


def _span(starts_BT: Tensor | None, length: int, window: int | None, device: torch.device) -> Span:
    if window is not None and window >= length:
        window = None
    if starts_BT is None and window is None:
        return Span()
    index = torch.arange(length, device=device)[None]
    low = torch.zeros_like(index) if starts_BT is None else starts_BT
    if window is not None:
        low = torch.maximum(low, index - window + 1)
    return Span(low, index.expand_as(low), aligned=True)


class PackedDocuments(NamedTuple):
    """The documents of a batch one after another without padding, as variable-length attention
    kernels expect them (`flash_attn_varlen_func` of FlashAttention).

    Take the tokens out of a batch with `x_BTX.flatten(0, 1)[indices_N]`. Documents are in order of
    rows and positions. A run of padding (-1) belongs to no document and is counted nowhere.
    """

    indices_N: Tensor
    """Indices of all tokens that are not padding in the flattened batch (B T), int64."""
    cu_seqlens: Tensor
    """(documents + 1) int32: document i consists of tokens cu_seqlens[i] to cu_seqlens[i + 1]."""
    max_seqlen: int
    """Length of the longest document, 0 if there is none."""


def pack_documents(
    segments_BT: Tensor | None, batch_size: int, length: int, device: torch.device
) -> PackedDocuments:
    """Return the documents of a batch (`batch_size`, `length`); without segments, each row is one.

    With segments, shapes depend on the data and the longest length is read from the device.
    """
    if segments_BT is None:
        indices_N = torch.arange(batch_size * length, device=device)
        cu_seqlens = length * torch.arange(batch_size + 1, dtype=torch.int32, device=device)
        return PackedDocuments(indices_N, cu_seqlens, length if batch_size else 0)
    indices_N = (segments_BT >= 0).flatten().nonzero()[:, 0]
    begins = is_document_start(segments_BT).flatten()[indices_N].nonzero()[:, 0]
    cu_seqlens = torch.cat((begins, begins.new_tensor([len(indices_N)]))).int()
    longest = int(cu_seqlens.diff().max()) if len(begins) else 0
    return PackedDocuments(indices_N, cu_seqlens, longest)

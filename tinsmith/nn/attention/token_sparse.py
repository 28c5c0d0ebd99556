"""Attention over the `index_topk` tokens that an indexer selects per query, the same for all heads.

Queries are processed in chunks, so that no (queries x keys) tensor is stored. A chunk is recomputed
for its gradient, and leaves out keys after its last query if the span is known to be causal. It
gathers the selected keys and values, or masks all others if there are few keys. `kind="naive"`
computes the formula directly.

Legend: B rows, T queries, S keys, C queries of a chunk, N keys visible to it, K selected keys, H
heads, G key heads, J = H / G, D width of queries and keys, E width of values.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tinsmith.nn.attention.indexer import IndexerKL, IndexerOutput, index_scores, target_attention
from tinsmith.nn.attention.span import Span
from tinsmith.nn.layers.stable_topk import stable_topk
from tinsmith.nn.precision import at_least_fp32

IndexTarget = Literal["dense", "selected"]


class TokenSparseConfig(NamedTuple):
    """How many tokens are selected, and what trains the indexer."""

    index_topk: int
    index_target: IndexTarget | None
    """None: the indexer is not trained, as in evaluation."""
    kind: str = "sdpa"
    dropout: float = 0.0


class SelectedTokens(NamedTuple):
    """The selected keys of each query of a chunk. Stored for the backward pass, so it is small."""

    index_BCK: Tensor
    span: Span
    """If it has fewer than `index_topk` keys, some of the selected ones are outside of it."""
    config: TokenSparseConfig

    def outside_span(self) -> Tensor:
        """Return (B, C, K) bool: True for selected keys outside the span."""
        low_BC, high_BC = self.span.bounds
        return (self.index_BCK < low_BC[..., None]) | (self.index_BCK > high_BC[..., None])

    def mask(self, keys: int) -> Tensor:
        """Return (B, C, S) bool: True for selected keys in the span."""
        visible_BCS = self.span.mask(self.index_BCK.shape[1], keys, self.index_BCK.device)
        return torch.zeros_like(visible_BCS).scatter(-1, self.index_BCK, True) & visible_BCS


def attend_topk_tokens(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGE: Tensor,
    index: IndexerOutput,
    span: Span,
    segments_BT: Tensor | None,
    config: TokenSparseConfig,
) -> tuple[Tensor, Tensor | None]:
    """Return attention (B, T, H, E), and in training the indexer's KL divergence, its mean over
    tokens without padding.

    The keys must be in order of positions.
    """
    k_BSGD, v_BSGE = k_BSGD.to(q_BTHD.dtype), v_BSGE.to(q_BTHD.dtype)
    rows, queries, keys = *q_BTHD.shape[:2], k_BSGD.shape[1]
    whole = span.materialize(rows, queries, keys, q_BTHD.device)
    weight_BT = _token_weights(segments_BT, q_BTHD)
    step, output = _chunk_size(keys), []
    kl = None if config.index_target is None else IndexerKL(index)
    attend = _attend_checkpointed if torch.is_grad_enabled() and queries > step else _attend
    for begin in range(0, max(queries, 1), step):
        part = slice(begin, min(begin + step, queries))
        visible_keys = span.num_visible_keys(part.stop, queries, keys)
        q_BCHD, index_C = q_BTHD[:, part], index.narrow(part, visible_keys)
        k_BNGD, v_BNGE = k_BSGD[:, :visible_keys], v_BSGE[:, :visible_keys]
        selected = _select(index_C, whole.slice_queries(part), config)
        output.append(attend(q_BCHD, k_BNGD, v_BNGE, selected))
        if kl is not None:
            visible_BCN = _target_mask(selected, visible_keys)
            target_BCN = target_attention(q_BCHD, k_BNGD, visible_BCN)
            kl.add(part, target_BCN, visible_BCN, weight_BT[:, part])
    mean = None if kl is None else kl.sum() / weight_BT.sum().clamp(min=1)
    return torch.cat(output, 1), mean


def _token_weights(segments_BT: Tensor | None, q_BTHD: Tensor) -> Tensor:
    """Return (B, T): 1 for tokens, 0 for padding, at least float32."""
    kind = at_least_fp32(q_BTHD.dtype)
    if segments_BT is None:
        return q_BTHD.new_ones(q_BTHD.shape[:2], dtype=kind)
    return (segments_BT >= 0).to(kind)


def _chunk_size(keys: int) -> int:
    """Return the number of queries of a chunk. It depends on the number of keys alone, so that rows
    do not change each other's rounding.
    """
    return min(max(2**22 // max(keys, 1), 16), 256)


@torch.no_grad()
def _select(index: IndexerOutput, span: Span, config: TokenSparseConfig) -> SelectedTokens:
    scores_BCS = index_scores(index)
    queries, keys = scores_BCS.shape[1:]
    hidden_BCS = ~span.mask(queries, keys, scores_BCS.device)
    index_BCK = stable_topk(scores_BCS.masked_fill_(hidden_BCS, -math.inf), config.index_topk)
    return SelectedTokens(index_BCK, span, config)


def _target_mask(selected: SelectedTokens, keys: int) -> Tensor:
    """Return (B, C, S) bool: the keys over which the indexer's divergence is computed."""
    if selected.config.index_target == "selected":
        return selected.mask(keys)
    return selected.span.mask(selected.index_BCK.shape[1], keys, selected.index_BCK.device)


def _attend_checkpointed(
    q_BCHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, selected: SelectedTokens
) -> Tensor:
    """Attend with activation checkpointing, so that only the selection of a chunk is stored."""
    return checkpoint(_attend, q_BCHD, k_BSGD, v_BSGE, selected, use_reentrant=False)  # type: ignore[return-value]


def _attend(q_BCHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, selected: SelectedTokens) -> Tensor:
    """Attend by gathering `index_topk` keys per query and group, or by a product over all keys,
    which handles about sixty times as many numbers in the same time (LOG.md).
    """
    if selected.config.kind == "naive":
        return _naive(q_BCHD, k_BSGD, v_BSGE, selected)
    (keys, groups), heads = k_BSGD.shape[1:3], q_BCHD.shape[2]
    way = _masked if keys * heads <= 60 * selected.config.index_topk * groups else _gather
    return way(q_BCHD, k_BSGD, v_BSGE, selected)


def _gather(q_BCHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, selected: SelectedTokens) -> Tensor:
    groups, kind = k_BSGD.shape[2], at_least_fp32(q_BCHD.dtype)
    k_BCKGD, v_BCKGE = (_rows(table, selected.index_BCK) for table in (k_BSGD, v_BSGE))
    q_BCGJD = q_BCHD.unflatten(2, (groups, -1))
    logits_BCGJK = torch.einsum("bcgjd,bckgd->bcgjk", q_BCGJD, k_BCKGD) / _root(q_BCHD)
    hidden_BCK = selected.outside_span()[:, :, None, None]
    logits_BCGJK = logits_BCGJK.to(kind).masked_fill(hidden_BCK, -math.inf)
    weights = F.dropout(logits_BCGJK.softmax(-1), selected.config.dropout).to(v_BSGE.dtype)
    return torch.einsum("bcgjk,bckge->bcgje", weights, v_BCKGE).flatten(2, 3)


def _masked(q_BCHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, selected: SelectedTokens) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BCHD, k_BSGD, v_BSGE))
    shared = q.shape[1] != k.shape[1]
    y_BHCE = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=selected.mask(k.shape[2])[:, None],
        dropout_p=selected.config.dropout,
        enable_gqa=shared,
    )
    return y_BHCE.transpose(1, 2)


def _naive(q_BCHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, selected: SelectedTokens) -> Tensor:
    share, kind = q_BCHD.shape[2] // k_BSGD.shape[2], at_least_fp32(q_BCHD.dtype)
    k, v = (table.repeat_interleave(share, 2).to(kind) for table in (k_BSGD, v_BSGE))
    logits_BHCS = torch.einsum("bchd,bshd->bhcs", q_BCHD.to(kind), k) / _root(q_BCHD)
    weights = logits_BHCS.masked_fill(~selected.mask(k.shape[1])[:, None], -math.inf).softmax(-1)
    weights = F.dropout(weights, selected.config.dropout)
    return torch.einsum("bhcs,bshe->bche", weights, v).to(q_BCHD.dtype)


def _rows(table_BSGD: Tensor, index_BCK: Tensor) -> Tensor:
    """Return the selected rows (B, C, K, G, D). An embedding look-up adds the gradients of a
    repeated index one by one.
    """
    rows, keys, groups, width = table_BSGD.shape
    begin_B11 = torch.arange(rows, device=table_BSGD.device)[:, None, None] * keys
    flat = table_BSGD.reshape(rows * keys, groups * width)
    return F.embedding(index_BCK + begin_B11, flat).unflatten(-1, (groups, width))


def _root(q: Tensor) -> float:
    return math.sqrt(q.shape[-1])

"""Attention over the `index_topk` tokens that an indexer selects per query, the same for all heads.

Queries go in chunks, so that (queries x keys) is never held whole; what a chunk needs is computed
again for its gradient, and keys after its end are left out where that is known. A chunk gathers
the chosen keys and values, or masks all others where those are few; its naive twin writes that out.

Legend: B rows, T queries, S keys, C queries of a chunk, N keys it may see, K chosen, H heads, G key
heads, J = H / G, D width of queries and keys, E width of values.
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
    """How tokens are chosen, and what the indexer learns from."""

    index_topk: int
    index_target: IndexTarget | None
    """None: nothing, outside of training."""
    kind: str = "sdpa"
    dropout: float = 0.0


class SelectedTokens(NamedTuple):
    """Which keys each query of a chunk attends to; small, for it is kept until the gradient."""

    index_BCK: Tensor
    span: Span
    """Where fewer than `index_topk` are in sight, some of the chosen are not."""
    config: TokenSparseConfig

    def outside_span(self) -> Tensor:
        """(B, C, K) bool: chosen, but out of sight."""
        low_BC, high_BC = self.span.bounds
        return (self.index_BCK < low_BC[..., None]) | (self.index_BCK > high_BC[..., None])

    def mask(self, keys: int) -> Tensor:
        """(B, C, S) bool: chosen and in sight."""
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
    """Attention (B, T, H, E), and where the indexer learns the mean over real tokens of its
    divergence.

    `seen` is of keys in order of places.
    """
    k_BSGD, v_BSGE = k_BSGD.to(q_BTHD.dtype), v_BSGE.to(q_BTHD.dtype)
    rows, queries, keys = *q_BTHD.shape[:2], k_BSGD.shape[1]
    whole = span.materialize(rows, queries, keys, q_BTHD.device)
    counted_BT = _counted(segments_BT, q_BTHD)
    step, output = _queries_at_once(keys), []
    lost = None if config.index_target is None else IndexerKL(index)
    attend = _again if torch.is_grad_enabled() and queries > step else _attend
    for begin in range(0, max(queries, 1), step):
        part = slice(begin, min(begin + step, queries))
        near = span.num_visible_keys(part.stop, queries, keys)
        q_BCHD, index_C = q_BTHD[:, part], index.narrow(part, near)
        k_BNGD, v_BNGE = k_BSGD[:, :near], v_BSGE[:, :near]
        some = _choose(index_C, whole.slice_queries(part), config)
        output.append(attend(q_BCHD, k_BNGD, v_BNGE, some))
        if lost is not None:
            visible_BCN = _learned(some, near)
            wanted_BCN = target_attention(q_BCHD, k_BNGD, visible_BCN)
            lost.add(part, wanted_BCN, visible_BCN, counted_BT[:, part])
    mean = None if lost is None else lost.sum() / counted_BT.sum().clamp(min=1)
    return torch.cat(output, 1), mean


def _counted(segments_BT: Tensor | None, q_BTHD: Tensor) -> Tensor:
    """(B, T): 1 for real tokens, 0 for padding, at least float32."""
    kind = at_least_fp32(q_BTHD.dtype)
    if segments_BT is None:
        return q_BTHD.new_ones(q_BTHD.shape[:2], dtype=kind)
    return (segments_BT >= 0).to(kind)


def _queries_at_once(keys: int) -> int:
    """By the number of keys alone, so that other rows change no bit of one."""
    return min(max(2**22 // max(keys, 1), 16), 256)


@torch.no_grad()
def _choose(index: IndexerOutput, seen: Span, choice: TokenSparseConfig) -> SelectedTokens:
    scores_BCS = index_scores(index)
    queries, keys = scores_BCS.shape[1:]
    hidden_BCS = ~seen.mask(queries, keys, scores_BCS.device)
    return SelectedTokens(
        stable_topk(scores_BCS.masked_fill_(hidden_BCS, -math.inf), choice.index_topk), seen, choice
    )


def _learned(some: SelectedTokens, keys: int) -> Tensor:
    """(B, C, S) bool: over which keys the indexer's divergence is taken."""
    if some.config.index_target == "selected":
        return some.mask(keys)
    return some.span.mask(some.index_BCK.shape[1], keys, some.index_BCK.device)


def _again(q_BCHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, some: SelectedTokens) -> Tensor:
    """Computed once more for its gradient, so that nothing of a chunk but its choice is kept."""
    return checkpoint(_attend, q_BCHD, k_BSGD, v_BSGE, some, use_reentrant=False)  # type: ignore[return-value]


def _attend(q_BCHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, some: SelectedTokens) -> Tensor:
    """Attend by gathering `index_topk` keys per query and group, or by a product over all keys,
    which handles about sixty times as many numbers in the same time (LOG.md).
    """
    if some.config.kind == "naive":
        return _written_out(q_BCHD, k_BSGD, v_BSGE, some)
    (keys, groups), heads = k_BSGD.shape[1:3], q_BCHD.shape[2]
    way = _masked if keys * heads <= 60 * some.config.index_topk * groups else _gathered
    return way(q_BCHD, k_BSGD, v_BSGE, some)


def _gathered(q_BCHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, some: SelectedTokens) -> Tensor:
    groups, kind = k_BSGD.shape[2], at_least_fp32(q_BCHD.dtype)
    k_BCKGD, v_BCKGE = (_rows(table, some.index_BCK) for table in (k_BSGD, v_BSGE))
    q_BCGJD = q_BCHD.unflatten(2, (groups, -1))
    logits_BCGJK = torch.einsum("bcgjd,bckgd->bcgjk", q_BCGJD, k_BCKGD) / _root(q_BCHD)
    hidden_BCK = some.outside_span()[:, :, None, None]
    logits_BCGJK = logits_BCGJK.to(kind).masked_fill(hidden_BCK, -math.inf)
    weights = F.dropout(logits_BCGJK.softmax(-1), some.config.dropout).to(v_BSGE.dtype)
    return torch.einsum("bcgjk,bckge->bcgje", weights, v_BCKGE).flatten(2, 3)


def _masked(q_BCHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, some: SelectedTokens) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BCHD, k_BSGD, v_BSGE))
    shared = q.shape[1] != k.shape[1]
    y_BHCE = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=some.mask(k.shape[2])[:, None],
        dropout_p=some.config.dropout,
        enable_gqa=shared,
    )
    return y_BHCE.transpose(1, 2)


def _written_out(q_BCHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, some: SelectedTokens) -> Tensor:
    share, kind = q_BCHD.shape[2] // k_BSGD.shape[2], at_least_fp32(q_BCHD.dtype)
    k, v = (table.repeat_interleave(share, 2).to(kind) for table in (k_BSGD, v_BSGE))
    logits_BHCS = torch.einsum("bchd,bshd->bhcs", q_BCHD.to(kind), k) / _root(q_BCHD)
    weights = logits_BHCS.masked_fill(~some.mask(k.shape[1])[:, None], -math.inf).softmax(-1)
    weights = F.dropout(weights, some.config.dropout)
    return torch.einsum("bhcs,bshe->bche", weights, v).to(q_BCHD.dtype)


def _rows(table_BSGD: Tensor, chosen_BCK: Tensor) -> Tensor:
    """(B, C, K, G, D), as an embedding: the gradient of an index is summed one by one."""
    rows, keys, groups, width = table_BSGD.shape
    begin_B11 = torch.arange(rows, device=table_BSGD.device)[:, None, None] * keys
    flat = table_BSGD.reshape(rows * keys, groups * width)
    return F.embedding(chosen_BCK + begin_B11, flat).unflatten(-1, (groups, width))


def _root(q: Tensor) -> float:
    return math.sqrt(q.shape[-1])

"""Attention itself: which keys a query may see, and the weighted sum over them.

    y_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s      over the keys s within reach of t

A document is a run of one segment id, so the keys within reach of a query are one interval of
places in its row: from the first token of its document, or `window` tokens back, up to itself.
`Reach` is that interval; causality, windows, packed documents, padding and caches are all nothing
but intervals, and no query is ever without a key.

Legend: B rows, T queries, S keys, H query heads, G key heads, D head width.

What mixers with heads share: sizes of grouped heads, and the gate that mixes branches.
"""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.nn.attention.cpu import blockwise_attention
from tinsmith.nn.contract import MixerConfigBase
from tinsmith.nn.precision import at_least_fp32

INF = 2**30

MASK_BYTES = 2**26
"""Pairs of queries and keys of which it is written down at a time who sees whom: bytes."""


class Span(NamedTuple):
    """Query t of row b sees the keys whose place is in [low, high]. All None: the T queries are
    the last T keys.
    """

    low_BT: Tensor | None = None
    high_BT: Tensor | None = None
    key_positions_BS: Tensor | None = None
    """Where each key stands in its row (below 0: nowhere); None: keys stand in order, from place
    0.
    """
    aligned: bool = False
    """The keys are the queries' own tokens, so that no query sees a key after its own: known
    without a look at the ends.
    """

    def num_visible_keys(self, stop: int, queries: int, keys: int) -> int:
        """Queries before `stop` see none but the first so many keys."""
        return keys - queries + stop if self.is_causal or self.aligned else keys

    @property
    def is_causal(self) -> bool:
        """Causality and nothing else."""
        return self.high_BT is None and self.key_positions_BS is None

    def materialize(self, batch_size: int, queries: int, keys: int, device: torch.device) -> "Span":
        """The same with both ends written out, (B, T) each."""
        high = self.high_BT
        if high is None:
            high = torch.arange(keys - queries, keys, device=device)[None]
        low = torch.zeros_like(high) if self.low_BT is None else self.low_BT
        return Span(low.expand(batch_size, -1), high.expand(batch_size, -1), self.key_positions_BS)

    def slice_queries(self, queries: slice) -> "Span":
        """The same for some of the queries, where both ends are written out."""
        low_BT, high_BT = self.bounds
        return Span(low_BT[:, queries], high_BT[:, queries], self.key_positions_BS)

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Low and high, where both are written out."""
        assert self.low_BT is not None
        assert self.high_BT is not None
        return self.low_BT, self.high_BT

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """(B or 1, T, S) bool."""
        if self.key_positions_BS is None:
            places = torch.arange(keys, device=device)[None, None]
        else:
            places = self.key_positions_BS[:, None]
        if self.high_BT is None:
            return places <= torch.arange(keys - queries, keys, device=device)[None, :, None]
        seen = places <= self.high_BT[..., None]
        return seen if self.low_BT is None else seen & (places >= self.low_BT[..., None])


def document_starts(segments_BT: Tensor) -> Tensor:
    """(B, T): the index at which the run of equal segment ids that holds t begins."""
    index = torch.arange(segments_BT.shape[1], device=segments_BT.device).expand_as(segments_BT)
    border = torch.ones_like(segments_BT, dtype=torch.bool)
    border[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return torch.where(border, index, 0).cummax(1).values


def attention_span(
    segments_BT: Tensor | None, length: int, window: int | None, device: torch.device
) -> Span:
    """What each of `length` tokens sees of the same tokens (no cache)."""
    narrow = window is not None and window < length
    if segments_BT is None and not narrow:
        return Span()
    index = torch.arange(length, device=device)[None]
    low = torch.zeros_like(index) if segments_BT is None else document_starts(segments_BT)
    if narrow and window is not None:
        low = torch.maximum(low, index - window + 1)
    return Span(low, index.expand_as(low), aligned=True)


def attend(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    span: Span,
    *,
    kind: str = "sdpa",
    dropout: float = 0.0,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention with H query heads over G key heads (G divides H); (B, T, H, D).

    `kind`: "naive" writes the formula out and is the oracle of "sdpa". `sinks_H` adds exp(z_h) to
    the softmax's denominator (gpt-oss). `dropout` acts on the weights. Keys and values that a cache
    holds in another dtype become the queries'.
    """
    k_BSGD, v_BSGD = k_BSGD.to(q_BTHD.dtype), v_BSGD.to(q_BTHD.dtype)
    if kind == "naive":
        return _naive(q_BTHD, k_BSGD, v_BSGD, span, dropout, sinks_H)
    if sinks_H is not None:
        return _with_sinks(q_BTHD, k_BSGD, v_BSGD, span, dropout, sinks_H)
    queries, keys = q_BTHD.shape[1], k_BSGD.shape[1]
    if _in_blocks(q_BTHD, span) and not dropout:
        return blockwise_attention(q_BTHD, k_BSGD, v_BSGD, span.low_BT, span.high_BT)
    if span.is_causal and queries in (1, keys):
        return _sdpa(q_BTHD, k_BSGD, v_BSGD, None, dropout)
    return _masked(q_BTHD, k_BSGD, v_BSGD, span, dropout)


def _in_blocks(q_BTHD: Tensor, seen: Span) -> bool:
    """Whether our own operator takes it: several queries on a CPU, keys in order of places. It
    rounds scores to the dtype of q: training bears that in bfloat16, answers are not asked to, and
    float16 would overflow.
    """
    several = q_BTHD.shape[1] > 1 and q_BTHD.numel() > 0
    exact = q_BTHD.dtype in (torch.float32, torch.float64)
    fine = exact or (q_BTHD.dtype == torch.bfloat16 and torch.is_grad_enabled())
    return several and fine and q_BTHD.device.type == "cpu" and seen.key_positions_BS is None


def _masked(q: Tensor, k: Tensor, v: Tensor, seen: Span, dropout: float) -> Tensor:
    """Queries go by chunks, so that who sees whom, (B, T, S), never exists whole where it is large,
    and a chunk meets no key behind its last query where that is known.
    """
    (rows, queries, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    size = max(1, MASK_BYTES // max(1, rows * keys * (heads // groups)))
    whole, output = seen.materialize(rows, queries, keys, q.device), []
    for start in range(0, max(1, queries), size):  # one chunk, of nothing, where nobody asks
        part = slice(start, min(start + size, queries))
        end = seen.num_visible_keys(part.stop, queries, keys)
        mask_BTS = whole.slice_queries(part).mask(part.stop - start, end, q.device)
        output.append(_sdpa(q[:, part], k[:, :end], v[:, :end], mask_BTS, dropout))
    return torch.cat(output, 1)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask_BTS: Tensor | None, dropout: float, scaled: int = 0
) -> Tensor:
    """torch's kernels. Without a mask: causal, or a single query. With one, heads go as queries of
    the group whose keys they share: fewer kernels know masks and shared keys at once (on a GPU only
    the one that writes all scores out), and a single query reads its keys once for all of them.
    `scaled`: the width whose root divides scores, if it is not that of q.
    """
    (_, queries, heads, width), groups = q.shape, k.shape[2]
    k, v, scale = k.transpose(1, 2), v.transpose(1, 2), 1 / math.sqrt(scaled or width)
    if mask_BTS is None and queries > 1:
        q, shared = q.transpose(1, 2), heads != groups
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=shared
        ).transpose(1, 2)
    share = heads // groups
    q = q.unflatten(2, (groups, share)).transpose(1, 2).flatten(2, 3)
    mask = None
    if mask_BTS is not None:
        mask = mask_BTS[:, None, :, None].expand(-1, 1, queries, share, -1).flatten(2, 3)
    y_BGND = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
    return y_BGND.unflatten(2, (queries, share)).transpose(1, 2).flatten(2, 3)


def _with_sinks(
    q: Tensor, k: Tensor, v: Tensor, seen: Span, dropout: float, sinks_H: Tensor
) -> Tensor:
    """A sink is one more key, with value 0, whose logit is z: it fits in one more channel of q and
    k.

    q' = [q, z sqrt(d)], k' = [k, 0] for real keys and [0, 1] for the sink, so q'.k' / sqrt(d) is
    the old logit or z.
    """
    rows, queries, heads, width = q.shape
    keys, groups = k.shape[1:3]
    extra = (sinks_H * math.sqrt(width)).to(q.dtype).expand(rows, queries, heads)[..., None]
    sink = F.pad(k.new_zeros(rows, 1, groups, width), (0, 1), value=1.0)
    k = torch.cat((sink, F.pad(k, (0, 1))), 1)
    v = F.pad(v, (0, 1, 0, 0, 1, 0))
    mask_BTS = F.pad(seen.mask(queries, keys, q.device), (1, 0), value=True)
    return _sdpa(torch.cat((q, extra), -1), k, v, mask_BTS, dropout, scaled=width)[..., :width]


def _naive(
    q: Tensor, k: Tensor, v: Tensor, seen: Span, dropout: float, sinks_H: Tensor | None
) -> Tensor:
    share = q.shape[2] // k.shape[2]
    kind = at_least_fp32(q.dtype)
    k, v = k.repeat_interleave(share, 2).to(kind), v.repeat_interleave(share, 2).to(kind)
    scores_BHTS = torch.einsum("bthd,bshd->bhts", q.to(kind), k) / math.sqrt(q.shape[-1])
    visible = seen.mask(q.shape[1], k.shape[1], q.device)[:, None]
    scores_BHTS = scores_BHTS.masked_fill(~visible, -math.inf)
    if sinks_H is not None:
        column = sinks_H.to(kind)[None, :, None, None].expand(*scores_BHTS.shape[:3], 1)
        scores_BHTS = torch.cat((scores_BHTS, column), -1)
    weights = scores_BHTS.softmax(-1)[..., : k.shape[1]]
    return torch.einsum("bhts,bshd->bthd", F.dropout(weights, dropout), v).to(q.dtype)


class GroupedHeads(MixerConfigBase):
    """Sizes of a mixer whose `heads` query heads share `kv_heads` key and value heads."""

    heads: int
    kv_heads: int | None
    head_dim: int | None
    value_residual: bool
    rope: bool

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    def resolve_head_dim(self, dim: int) -> int:
        """Numbers per head at model width `dim`."""
        return self.head_dim or dim // self.heads

    def check(self, dim: int) -> None:
        """Head widths must be whole, and even where they are rotated."""
        if self.head_dim is None and dim % self.heads:
            raise ValueError(
                f"dim={dim} must be a multiple of heads={self.heads}, or head_dim be given"
            )
        if self.rope and self.resolve_head_dim(dim) % 2:
            raise ValueError(
                f"head_dim={self.resolve_head_dim(dim)} must be even to be rotated (or rope: false)"
            )

    def value_residual_shape(self, dim: int) -> tuple[int, int] | None:
        """(kv_heads, head_dim) where values are shared between layers."""
        return (self.num_kv_heads, self.resolve_head_dim(dim)) if self.value_residual else None


class BranchGate(nn.Linear):
    """Scores branches; each row of its weight is for one branch of one head."""

    ROLE: ClassVar[Literal["router"]] = "router"

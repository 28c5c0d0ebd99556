"""Scaled dot-product attention, and what mixers with heads share: the sizes of grouped heads, and
the gate that mixes branches.

    y_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s      over the keys s in the span of query t

`attention.span` defines spans.

Legend: B rows, T queries, S keys, H query heads, G key heads, D head width.
"""

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.nn.attention.cpu import blockwise_attention
from tinsmith.nn.attention.span import Span
from tinsmith.nn.contract import MixerConfigBase
from tinsmith.nn.precision import at_least_fp32

MASK_BYTES = 2**26
"""Largest attention mask that is built at once, in bytes."""


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
    """Return attention (B, T, H, D) of H query heads over G key and value heads; G divides H.

    `kind`: "sdpa" uses fast kernels, "naive" computes the formula step by step and is their oracle.
    `sinks_H` adds exp(z_h) to the softmax's denominator (gpt-oss). `dropout` acts on the attention
    weights. Keys and values are converted to the dtype of the queries.
    """
    k_BSGD, v_BSGD = k_BSGD.to(q_BTHD.dtype), v_BSGD.to(q_BTHD.dtype)
    if kind == "naive":
        return _naive(q_BTHD, k_BSGD, v_BSGD, span, dropout, sinks_H)
    if sinks_H is not None:
        return _with_sinks(q_BTHD, k_BSGD, v_BSGD, span, dropout, sinks_H)
    queries, keys = q_BTHD.shape[1], k_BSGD.shape[1]
    if _use_blockwise(q_BTHD, span) and not dropout:
        return blockwise_attention(q_BTHD, k_BSGD, v_BSGD, span.low_BT, span.high_BT)
    if span.is_causal and queries in (1, keys):
        return _sdpa(q_BTHD, k_BSGD, v_BSGD, None, dropout)
    return _masked(q_BTHD, k_BSGD, v_BSGD, span, dropout)


def _use_blockwise(q_BTHD: Tensor, span: Span) -> bool:
    """Return True for several queries on a CPU whose keys are in order: `attention.cpu` is faster.

    It rounds scores to the dtype of q. In bfloat16 that is precise enough for training, but not for
    inference; float16 would overflow.
    """
    several = q_BTHD.shape[1] > 1 and q_BTHD.numel() > 0
    exact = q_BTHD.dtype in (torch.float32, torch.float64)
    fine = exact or (q_BTHD.dtype == torch.bfloat16 and torch.is_grad_enabled())
    return several and fine and q_BTHD.device.type == "cpu" and span.key_positions_BS is None


def _masked(q: Tensor, k: Tensor, v: Tensor, span: Span, dropout: float) -> Tensor:
    """Compute masked attention in chunks of queries, so that no mask exceeds `MASK_BYTES`.

    A chunk leaves out the keys after its last query if the span is known to be causal.
    """
    (rows, queries, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    size = max(1, MASK_BYTES // max(1, rows * keys * (heads // groups)))
    whole, output = span.materialize(rows, queries, keys, q.device), []
    for start in range(0, max(1, queries), size):  # an empty chunk if there are no queries
        part = slice(start, min(start + size, queries))
        end = span.num_visible_keys(part.stop, queries, keys)
        mask_BTS = whole.slice_queries(part).mask(part.stop - start, end, q.device)
        output.append(_sdpa(q[:, part], k[:, :end], v[:, :end], mask_BTS, dropout))
    return torch.cat(output, 1)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask_BTS: Tensor | None, dropout: float, scaled: int = 0
) -> Tensor:
    """Compute attention with PyTorch's kernels; without a mask, causal or of a single query.

    With a mask, the query heads of a group become queries of one head. Few kernels support masks
    together with grouped heads (on a GPU only the one that stores all scores), and a single query
    reads its keys once for all heads of the group. `scaled`: width by whose root scores are
    divided, if not that of q.
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
    q: Tensor, k: Tensor, v: Tensor, span: Span, dropout: float, sinks_H: Tensor
) -> Tensor:
    """Compute attention with sinks: one more key per row with value 0 and logit z, expressed by one
    more channel of q and k.

    q' = [q, z sqrt(d)], k' = [k, 0] for keys and [0, 1] for the sink, so q'.k' / sqrt(d) is the
    logit of a key, or z.
    """
    rows, queries, heads, width = q.shape
    keys, groups = k.shape[1:3]
    extra = (sinks_H * math.sqrt(width)).to(q.dtype).expand(rows, queries, heads)[..., None]
    sink = F.pad(k.new_zeros(rows, 1, groups, width), (0, 1), value=1.0)
    k = torch.cat((sink, F.pad(k, (0, 1))), 1)
    v = F.pad(v, (0, 1, 0, 0, 1, 0))
    mask_BTS = F.pad(span.mask(queries, keys, q.device), (1, 0), value=True)
    return _sdpa(torch.cat((q, extra), -1), k, v, mask_BTS, dropout, scaled=width)[..., :width]


def _naive(
    q: Tensor, k: Tensor, v: Tensor, span: Span, dropout: float, sinks_H: Tensor | None
) -> Tensor:
    share = q.shape[2] // k.shape[2]
    kind = at_least_fp32(q.dtype)
    k, v = k.repeat_interleave(share, 2).to(kind), v.repeat_interleave(share, 2).to(kind)
    scores_BHTS = torch.einsum("bthd,bshd->bhts", q.to(kind), k) / math.sqrt(q.shape[-1])
    visible = span.mask(q.shape[1], k.shape[1], q.device)[:, None]
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
        """Return the number of key and value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    def resolve_head_dim(self, dim: int) -> int:
        """Return the width of a head at model width `dim`."""
        return self.head_dim or dim // self.heads

    def check(self, dim: int) -> None:
        """Raise ValueError if heads do not divide `dim`, or a rotated head has an odd width."""
        if self.head_dim is None and dim % self.heads:
            raise ValueError(
                f"dim={dim} must be a multiple of heads={self.heads}, or head_dim be given"
            )
        if self.rope and self.resolve_head_dim(dim) % 2:
            raise ValueError(
                f"head_dim={self.resolve_head_dim(dim)} must be even to be rotated (or rope: false)"
            )

    def value_residual_shape(self, dim: int) -> tuple[int, int] | None:
        """Return (kv_heads, head_dim) if values are mixed with those of an earlier layer."""
        return (self.num_kv_heads, self.resolve_head_dim(dim)) if self.value_residual else None


class BranchGate(nn.Linear):
    """Linear layer that scores branches. Each row of its weight is for one branch of one head."""

    ROLE: ClassVar[Literal["router"]] = "router"

"""Attention on a CPU, a block of queries at a time.

PyTorch's kernel for CPUs multiplies small tiles, at a sixth of the machine's matrix-product rate
(LOG.md). Here a block of queries and all keys that any of them attends to are one large product. No
(queries x keys) tensor is stored, and the backward pass recomputes the weights block by block (the
idea of FlashAttention, Dao et al., 2205.14135, without its tiles of keys). Scores are rounded to
the dtype of the queries; sums are float32.

The two operators are opaque to torch.compile, which would otherwise unroll the loop.

Legend: B rows, T queries, S keys, G key heads, J query heads per key head, D width of queries and
keys, E width of values, N = B G, Q queries of a block, K keys visible to the block.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tinsmith.nn.precision import at_least_fp32

QUERY_BLOCK = 64
"""Queries of a block."""


def blockwise_attention(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, low_BT: Tensor | None, high_BT: Tensor | None
) -> Tensor:
    """Return attention (B, T, H, E) of query t over the keys low to high, both included.

    Without `high`, the T queries are the last T keys and attend to all keys up to themselves. Every
    query has at least one key.
    """
    if high_BT is not None and low_BT is None:
        low_BT = torch.zeros_like(high_BT)
    rows, queries, heads = q_BTHD.shape[:3]
    q, k, v = _grouped(q_BTHD, k_BSGD.shape[2]), _grouped(k_BSGD), _grouped(v_BSGE)
    y_NJTE = _attend(q, k[:, 0], v[:, 0], low_BT, high_BT)
    return y_NJTE.view(rows, heads, queries, -1).transpose(1, 2)


def _grouped(x_BTHD: Tensor, groups: int | None = None) -> Tensor:
    """Return x (B, T, H, D) as (B G, H / G, T, D), contiguous."""
    rows, length, heads, width = x_BTHD.shape
    groups = groups or heads
    moved = x_BTHD.transpose(1, 2).contiguous()
    return moved.view(rows * groups, heads // groups, length, width)


@torch.library.custom_op("tinsmith::attend_blockwise", mutates_args=())
def _attend(
    q_NJTD: Tensor, k_NSD: Tensor, v_NSE: Tensor, low_BT: Tensor | None, high_BT: Tensor | None
) -> Tensor:
    y_NJTE = q_NJTD.new_empty(*q_NJTD.shape[:3], v_NSE.shape[2])
    with torch.autocast("cpu", enabled=False):
        for part, visible, bias in _blocks(q_NJTD, k_NSD, low_BT, high_BT):
            q_NXD = _rows(q_NJTD, part)
            weights_NXK = _weights(q_NXD, k_NSD[:, visible], bias)
            y_NJTE[:, :, part] = (weights_NXK @ v_NSE[:, visible]).view_as(y_NJTE[:, :, part])
    return y_NJTE


@torch.library.custom_op("tinsmith::attend_blockwise_backward", mutates_args=())
def _backward(
    dy_NJTE: Tensor,
    y_NJTE: Tensor,
    q_NJTD: Tensor,
    k_NSD: Tensor,
    v_NSE: Tensor,
    low_BT: Tensor | None,
    high_BT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v.

    dV = P^T dY; dP = dY V^T; dS = P (dP - rowsum(dY Y)); dQ = dS K and dK = dS^T Q, scaled.
    """
    kind, scale = at_least_fp32(q_NJTD.dtype), _scale(q_NJTD)
    delta_NJT1 = (dy_NJTE.to(kind) * y_NJTE).sum(-1, keepdim=True).to(q_NJTD.dtype)
    dq_NJTD = torch.empty_like(q_NJTD)
    dk_NSD, dv_NSE = torch.zeros_like(k_NSD, dtype=kind), torch.zeros_like(v_NSE, dtype=kind)
    with torch.autocast("cpu", enabled=False):
        for part, visible, bias in _blocks(q_NJTD, k_NSD, low_BT, high_BT):
            q_NXD, dy_NXE = _rows(q_NJTD, part), _rows(dy_NJTE, part)
            k_NKD, v_NKE = k_NSD[:, visible], v_NSE[:, visible]
            weights_NXK = _weights(q_NXD, k_NKD, bias)
            ds_NXK = dy_NXE @ v_NKE.mT
            ds_NXK.sub_(_rows(delta_NJT1, part)).mul_(weights_NXK)
            dq_NJTD[:, :, part] = (ds_NXK @ k_NKD).view_as(dq_NJTD[:, :, part])
            dk_NSD[:, visible] += ds_NXK.mT @ q_NXD
            dv_NSE[:, visible] += weights_NXK.mT @ dy_NXE
    return dq_NJTD.mul_(scale), dk_NSD.mul_(scale).to(k_NSD.dtype), dv_NSE.to(v_NSE.dtype)


def _blocks(
    q_NJTD: Tensor, k_NSD: Tensor, low_BT: Tensor | None, high_BT: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the queries of each block, the keys that any of them attends to, and a bias for the
    scores of the last of these keys: 0, or -inf where the query does not attend to the key.
    """
    queries, keys = q_NJTD.shape[2], k_NSD.shape[1]
    for start in range(0, queries, QUERY_BLOCK):
        part = slice(start, min(start + QUERY_BLOCK, queries))
        if low_BT is None or high_BT is None:
            size = part.stop - start
            visible = slice(0, part.stop + keys - queries)
            yield part, visible, q_NJTD.new_full((size, size), -math.inf).triu_(1)
        else:
            low_BQ1, high_BQ1 = low_BT[:, part, None], high_BT[:, part, None]
            first, last = max(int(low_BQ1.min()), 0), min(int(high_BQ1.max()), keys - 1)
            visible = slice(first, last + 1)
            positions = torch.arange(visible.start, visible.stop)
            hidden_BQK = (positions < low_BQ1) | (positions > high_BQ1)
            bias_BQK = q_NJTD.new_zeros(hidden_BQK.shape).masked_fill_(hidden_BQK, -math.inf)
            yield part, visible, bias_BQK[:, None, None]


def _weights(q_NXD: Tensor, k_NKD: Tensor, bias: Tensor) -> Tensor:
    """Return the attention weights of a block (N, J Q, K)."""
    scores_NXK = q_NXD.new_empty(*q_NXD.shape[:2], k_NKD.shape[1])
    torch.baddbmm(scores_NXK, q_NXD, k_NKD.mT, beta=0, alpha=_scale(q_NXD), out=scores_NXK)
    rows, queries = (bias.shape[0] if bias.dim() > 2 else 1), bias.shape[-2]
    by_query = scores_NXK.view(rows, len(q_NXD) // rows, -1, queries, k_NKD.shape[1])
    by_query[..., -bias.shape[-1] :] += bias
    return scores_NXK.softmax(-1)


def _rows(x_NJTD: Tensor, part: slice) -> Tensor:
    """Return the queries of a block of all heads in one dimension: (N, J Q, D)."""
    return x_NJTD[:, :, part].flatten(1, 2)


def _scale(q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[-1])


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[2])


@_backward.register_fake
def _(dy: Tensor, y: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(dy.contiguous(), *ctx.saved_tensors), None, None


_attend.register_autograd(_gradients, setup_context=_save)

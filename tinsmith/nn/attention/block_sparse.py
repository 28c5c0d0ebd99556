"""Block-sparse attention: each query attends to a few selected blocks of keys.

    y_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s     over s <= t in the blocks selected for t

A block is `size` neighbouring keys. The blocks of one query do not overlap, and all heads of a
group have the same ones. The output of a query without blocks is 0. Three implementations:

- naive: all scores, masked; the oracle.
- by query: gather the selected keys of each query. For few queries, as in decoding.
- by block: sort (query, block) pairs by block and multiply each block of keys with all its queries.
  The partial results of a query are merged by log-sum-exp (the order of FSA, 2508.18224). Every
  product is dense and the memory is O(T); the backward pass recomputes the weights. This operator
  is opaque to torch.compile, and on a GPU it is `kernels.block_sparse`.

Scores and sums are at least float32.

Legend: B rows, T queries, S keys, H query heads, G key heads, J query heads per key head, D width,
C selected blocks, N = B G, P queries of one block, K keys of a block.
"""

import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.nn.precision import at_least_fp32

GATHER_MAX_QUERIES = 16
"""Largest number of queries per row for `by_query`."""
QUERY_CHUNK = 512
"""Queries of a block that are multiplied at a time, so that their scores fit in the CPU cache."""


def attend_topk_blocks(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    begins_BGTC: Tensor,
    cache_position_BT: Tensor,
    size: int,
    *,
    kind: str = "sdpa",
    dropout: float = 0.0,
) -> Tensor:
    """Return attention (B, T, H, D). `begins`: the positions at which selected blocks begin, -1 for
    none. `cache_position` (B or 1, T): the position of each query; key s has position s. Only
    `kind` "naive", the oracle, supports `dropout`.
    """
    k_BSGD, v_BSGD = k_BSGD.to(q_BTHD.dtype), v_BSGD.to(q_BTHD.dtype)
    if kind == "naive" or dropout:
        return naive(q_BTHD, k_BSGD, v_BSGD, begins_BGTC, cache_position_BT, size, dropout)
    attend = by_query if q_BTHD.shape[1] <= GATHER_MAX_QUERIES else by_block
    return attend(q_BTHD, k_BSGD, v_BSGD, begins_BGTC, cache_position_BT, size)


def naive(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    begins_BGTC: Tensor,
    cache_position_BT: Tensor,
    size: int,
    dropout: float = 0.0,
) -> Tensor:
    """Return the same from all scores, masked where keys are not selected."""
    key = torch.arange(k_BSGD.shape[1], device=q_BTHD.device)
    begin = begins_BGTC[..., None]
    selected_BGTS = ((begin >= 0) & (key >= begin) & (key < begin + size)).any(-2)
    mask_BGTS = selected_BGTS & (key <= cache_position_BT[:, None, :, None])
    q_BTGJD = _grouped(q_BTHD, k_BSGD.shape[2])
    k, v = k_BSGD.to(q_BTGJD.dtype), v_BSGD.to(q_BTGJD.dtype)
    scores = torch.einsum("btgjd,bsgd->bgjts", q_BTGJD, k)
    weights = F.dropout(_softmax(scores, mask_BGTS[:, :, None]), dropout)
    return torch.einsum("bgjts,bsgd->btgjd", weights, v).flatten(2, 3).to(q_BTHD.dtype)


def by_query(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    begins_BGTC: Tensor,
    cache_position_BT: Tensor,
    size: int,
) -> Tensor:
    """Return the same from gathered keys of each query, with memory for T C `size` keys."""
    position_BGTK = (begins_BGTC[..., None] + torch.arange(size, device=q_BTHD.device)).flatten(-2)
    selected_BGTK = (begins_BGTC >= 0).repeat_interleave(size, -1)
    mask_BGTK = selected_BGTK & (position_BGTK <= cache_position_BT[:, None, :, None])
    row = torch.arange(len(q_BTHD), device=q_BTHD.device)[:, None, None, None]
    group = torch.arange(k_BSGD.shape[2], device=q_BTHD.device)[:, None, None]
    index = (row, position_BGTK.where(mask_BGTK, 0), group)
    q_BTGJD = _grouped(q_BTHD, k_BSGD.shape[2])
    k_BGTKD, v_BGTKD = k_BSGD[index].to(q_BTGJD.dtype), v_BSGD[index].to(q_BTGJD.dtype)
    scores = torch.einsum("btgjd,bgtkd->bgtjk", q_BTGJD, k_BGTKD)
    weights = _softmax(scores, mask_BGTK[..., None, :])
    return torch.einsum("bgtjk,bgtkd->btgjd", weights, v_BGTKD).flatten(2, 3).to(q_BTHD.dtype)


def _grouped(q_BTHD: Tensor, groups: int) -> Tensor:
    """Return scaled queries by group (B, T, G, J, D), at least float32."""
    q_BTGJD = q_BTHD.to(at_least_fp32(q_BTHD.dtype)).unflatten(2, (groups, -1))
    return q_BTGJD / math.sqrt(q_BTHD.shape[-1])


def _softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the softmax of unmasked scores, 0 where all are masked."""
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return weights * mask.any(-1, keepdim=True)


def by_block(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    begins_BGTC: Tensor,
    cache_position_BT: Tensor,
    size: int,
) -> Tensor:
    """Return the same from the queries of each block."""
    rows, queries, heads, width = q_BTHD.shape
    groups = k_BSGD.shape[2]
    q_BGTJD = q_BTHD.unflatten(2, (groups, -1)).transpose(1, 2)
    q_NTJD = q_BGTJD.reshape(-1, queries, heads // groups, width)
    k_NSD, v_NSD = (x.transpose(1, 2).reshape(-1, x.shape[1], width) for x in (k_BSGD, v_BSGD))
    position_NT = cache_position_BT.expand(rows, -1).repeat_interleave(groups, 0)
    y_NTJD, _ = _attend(q_NTJD, k_NSD, v_NSD, begins_BGTC.flatten(0, 1), position_NT, size)
    return y_NTJD.unflatten(0, (rows, groups)).transpose(1, 2).flatten(2, 3)


def torch_forward(
    q_NTJD: Tensor,
    k_NSD: Tensor,
    v_NSD: Tensor,
    begins_NTC: Tensor,
    cache_position_NT: Tensor,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Return y (N, T, J, D) in the dtype of q, and the log-sum-exp of the scores (N, T, J), -inf
    without blocks.
    """
    kind = at_least_fp32(q_NTJD.dtype)
    y_NTJD = torch.zeros_like(q_NTJD)
    lse_NTJ = q_NTJD.new_zeros(q_NTJD.shape[:3], dtype=kind)
    with torch.autocast(q_NTJD.device.type, enabled=False):
        for n in range(len(q_NTJD)):
            q_TJD, k_SD, v_SD = _scaled(q_NTJD[n]), k_NSD[n].to(kind), v_NSD[n].to(kind)
            sum_TJD = torch.zeros_like(q_TJD)
            peak_TJ1 = q_TJD.new_full((*q_TJD.shape[:2], 1), -math.inf)
            total_TJ1 = torch.zeros_like(peak_TJ1)
            for block, query_P in _selected_blocks(begins_NTC[n], size, len(k_SD)):
                scores_PJK = _scores(
                    q_TJD[query_P], k_SD, block, cache_position_NT[n, query_P], size
                )
                before_PJ1 = peak_TJ1[query_P]
                peak_PJ1 = scores_PJK.amax(-1, keepdim=True).maximum(before_PJ1)
                weights_PJK = scores_PJK.sub_(peak_PJ1).exp_()
                shrink_PJ1 = before_PJ1.sub_(peak_PJ1).exp_()
                added_PJD = (weights_PJK.flatten(0, 1) @ v_SD[block]).view(-1, *q_TJD.shape[1:])
                added_PJD.addcmul_(sum_TJD[query_P], shrink_PJ1)
                added_PJ1 = weights_PJK.sum(-1, keepdim=True)
                added_PJ1.addcmul_(total_TJ1[query_P], shrink_PJ1)
                peak_TJ1[query_P], total_TJ1[query_P] = peak_PJ1, added_PJ1
                sum_TJD[query_P] = added_PJD
            # With a block, the total is at least 1: the weight of the largest score.
            total_TJ1.clamp_(min=1)
            y_NTJD[n] = sum_TJD / total_TJ1
            lse_NTJ[n] = (peak_TJ1 + total_TJ1.log())[..., 0]
    return y_NTJD, lse_NTJ


def torch_backward(
    dy_NTJD: Tensor,
    y_NTJD: Tensor,
    lse_NTJ: Tensor,
    q_NTJD: Tensor,
    k_NSD: Tensor,
    v_NSD: Tensor,
    begins_NTC: Tensor,
    cache_position_NT: Tensor,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v.

    dV = P^T dY; dP = dY V^T; dS = P (dP - rowsum(dY Y)); dQ = dS K and dK = dS^T Q, scaled.
    """
    kind = at_least_fp32(q_NTJD.dtype)
    dq_NTJD, dk_NSD, dv_NSD = (torch.zeros_like(x) for x in (q_NTJD, k_NSD, v_NSD))
    with torch.autocast(q_NTJD.device.type, enabled=False):
        for n in range(len(q_NTJD)):
            q_TJD, k_SD, v_SD = _scaled(q_NTJD[n]), k_NSD[n].to(kind), v_NSD[n].to(kind)
            dy_TJD, lse_TJ1 = dy_NTJD[n].to(kind), lse_NTJ[n, ..., None]
            delta_TJ1 = (dy_TJD * y_NTJD[n]).sum(-1, keepdim=True)
            dq_TJD, dk_SD, dv_SD = (torch.zeros_like(x) for x in (q_TJD, k_SD, v_SD))
            for block, query_P in _selected_blocks(begins_NTC[n], size, len(k_SD)):
                q_PJD, dy_XD = q_TJD[query_P], dy_TJD[query_P].flatten(0, 1)
                scores_PJK = _scores(q_PJD, k_SD, block, cache_position_NT[n, query_P], size)
                weights_PJK = scores_PJK.sub_(lse_TJ1[query_P]).exp_()
                ds_PJK = (dy_XD @ v_SD[block].mT).view_as(weights_PJK)
                ds_PJK.sub_(delta_TJ1[query_P]).mul_(weights_PJK)
                ds_XK, weights_XK = ds_PJK.flatten(0, 1), weights_PJK.flatten(0, 1)
                dq_TJD[query_P] += (ds_XK @ k_SD[block]).view_as(q_PJD)
                dk_SD[block].addmm_(ds_XK.mT, q_PJD.flatten(0, 1))
                dv_SD[block].addmm_(weights_XK.mT, dy_XD)
            dq_NTJD[n] = dq_TJD.div_(math.sqrt(q_TJD.shape[-1]))
            dk_NSD[n], dv_NSD[n] = dk_SD, dv_SD
    return dq_NTJD, dk_NSD, dv_NSD


def _selected_blocks(begins_TC: Tensor, size: int, keys: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield every selected block of keys with its queries in ascending order, at most QUERY_CHUNK
    at a time. Each pair of query and block occurs once.
    """
    sorted_X, order_X = begins_TC.flatten().sort(stable=True)
    begins, counts = sorted_X.unique_consecutive(return_counts=True)
    query_X = order_X // max(begins_TC.shape[1], 1)
    for begin, queries in zip(begins.tolist(), query_X.split(counts.tolist()), strict=True):
        if begin >= 0:
            block = slice(begin, min(begin + size, keys))
            for query_P in queries.split(QUERY_CHUNK):
                yield block, query_P


def _scores(q_PJD: Tensor, k_SD: Tensor, block: slice, position_P: Tensor, size: int) -> Tensor:
    """Return scores (P, J, K), -inf for keys after the query. Only queries inside the block have
    such keys: they come first, and are at most `size`.
    """
    k_KD = k_SD[block]
    scores_PJK = (q_PJD.flatten(0, 1) @ k_KD.mT).view(*q_PJD.shape[:2], -1)
    position_K = torch.arange(block.start, block.stop, device=position_P.device)
    later = position_K > position_P[:size, None, None]
    scores_PJK[:size].masked_fill_(later, -math.inf)
    return scores_PJK


def _scaled(q_TJD: Tensor) -> Tensor:
    return q_TJD.to(at_least_fp32(q_TJD.dtype)) / math.sqrt(q_TJD.shape[-1])


_attend = torch.library.custom_op("tinsmith::attend_selected", torch_forward, mutates_args=())
_backward = torch.library.custom_op(
    "tinsmith::attend_selected_backward", torch_backward, mutates_args=()
)


@_attend.register_kernel("cuda")
def _(q_NTJD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if not _use_triton(q_NTJD):
        return torch_forward(q_NTJD, *rest)
    from tinsmith.nn.kernels import block_sparse as kernels

    return kernels.forward(q_NTJD, *rest)


@_backward.register_kernel("cuda")
def _(dy_NTJD: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    if not _use_triton(dy_NTJD):
        return torch_backward(dy_NTJD, *rest)
    from tinsmith.nn.kernels import block_sparse as kernels

    return kernels.backward(dy_NTJD, *rest)


def _use_triton(x: Tensor) -> bool:
    """Return True if the Triton kernels apply. They sum in float32, so not to float64."""
    return x.dtype != torch.float64 and importlib.util.find_spec("triton") is not None


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=at_least_fp32(q.dtype))


@_backward.register_fake
def _(dy: Tensor, y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.size = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)


def _gradients(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *_backward(dy, *ctx.saved_tensors, ctx.size), None, None, None


_attend.register_autograd(_gradients, setup_context=_save)

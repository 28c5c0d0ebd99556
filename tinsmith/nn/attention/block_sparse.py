"""Attention of each query over a few blocks of keys that it has chosen.

    y_t = sum_s softmax_s(q_t . k_s / sqrt(d)) v_s     over s <= t in the blocks chosen at t

A block is `size` neighbouring keys; the blocks that one query chooses do not overlap; all heads of
a group choose alike. A query that chooses nothing says 0. Three ways to the same sum:

- naive: all scores, masked; the oracle.
- by query: gather the keys each query has chosen. For few queries, as in decoding.
- by block: sort (query, block) pairs by block and multiply each block of keys with all queries that
  chose it, adding to what those queries have so far by log-sum-exp (the order of FSA, 2508.18224).
  Every product is dense and the memory is O(T); the backward pass forms the weights again. This
  operator is opaque to torch.compile, and on a GPU it is `kernels.selected`.

Scores and sums are at least float32.

Legend: B rows, T queries, S keys, H query heads, G key heads, J query heads per key head, D width,
C chosen blocks, N = B G, P queries that chose one block, K keys of a block.
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
"""Up to so many queries a row, each gathers its own keys."""
QUERY_CHUNK = 512
"""Queries of a block that are multiplied at a time; their scores stay in the processor's cache."""


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
    """(B, T, H, D). `begins`: the places at which chosen blocks begin, -1 for none; `place` (B or
    1, T): where each query stands; key s stands at place s. `kind` "naive" is the oracle, and the
    one way that knows `dropout`.
    """
    k_BSGD, v_BSGD = k_BSGD.to(q_BTHD.dtype), v_BSGD.to(q_BTHD.dtype)
    if kind == "naive" or dropout:
        return naive(q_BTHD, k_BSGD, v_BSGD, begins_BGTC, cache_position_BT, size, dropout)
    way = by_query if q_BTHD.shape[1] <= GATHER_MAX_QUERIES else by_block
    return way(q_BTHD, k_BSGD, v_BSGD, begins_BGTC, cache_position_BT, size)


def naive(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    begins_BGTC: Tensor,
    cache_position_BT: Tensor,
    size: int,
    dropout: float = 0.0,
) -> Tensor:
    """Every score, those of keys that are not chosen masked."""
    key = torch.arange(k_BSGD.shape[1], device=q_BTHD.device)
    begin = begins_BGTC[..., None]
    chosen_BGTS = ((begin >= 0) & (key >= begin) & (key < begin + size)).any(-2)
    seen_BGTS = chosen_BGTS & (key <= cache_position_BT[:, None, :, None])
    q_BTGJD = _grouped(q_BTHD, k_BSGD.shape[2])
    k, v = k_BSGD.to(q_BTGJD.dtype), v_BSGD.to(q_BTGJD.dtype)
    scores = torch.einsum("btgjd,bsgd->bgjts", q_BTGJD, k)
    weights = F.dropout(_softmax(scores, seen_BGTS[:, :, None]), dropout)
    return torch.einsum("bgjts,bsgd->btgjd", weights, v).flatten(2, 3).to(q_BTHD.dtype)


def by_query(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    begins_BGTC: Tensor,
    cache_position_BT: Tensor,
    size: int,
) -> Tensor:
    """Each query's keys side by side: memory for T C `size` keys."""
    place_BGTK = (begins_BGTC[..., None] + torch.arange(size, device=q_BTHD.device)).flatten(-2)
    chosen_BGTK = (begins_BGTC >= 0).repeat_interleave(size, -1)
    seen_BGTK = chosen_BGTK & (place_BGTK <= cache_position_BT[:, None, :, None])
    row = torch.arange(len(q_BTHD), device=q_BTHD.device)[:, None, None, None]
    group = torch.arange(k_BSGD.shape[2], device=q_BTHD.device)[:, None, None]
    index = (row, place_BGTK.where(seen_BGTK, 0), group)
    q_BTGJD = _grouped(q_BTHD, k_BSGD.shape[2])
    k_BGTKD, v_BGTKD = k_BSGD[index].to(q_BTGJD.dtype), v_BSGD[index].to(q_BTGJD.dtype)
    scores = torch.einsum("btgjd,bgtkd->bgtjk", q_BTGJD, k_BGTKD)
    weights = _softmax(scores, seen_BGTK[..., None, :])
    return torch.einsum("bgtjk,bgtkd->btgjd", weights, v_BGTKD).flatten(2, 3).to(q_BTHD.dtype)


def _grouped(q_BTHD: Tensor, groups: int) -> Tensor:
    """The heads of a group together, scaled, at least float32: (B, T, G, J, D)."""
    q_BTGJD = q_BTHD.to(at_least_fp32(q_BTHD.dtype)).unflatten(2, (groups, -1))
    return q_BTGJD / math.sqrt(q_BTHD.shape[-1])


def _softmax(scores: Tensor, seen: Tensor) -> Tensor:
    """Over what is seen; 0 where nothing is."""
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
    return weights * seen.any(-1, keepdim=True)


def by_block(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    begins_BGTC: Tensor,
    cache_position_BT: Tensor,
    size: int,
) -> Tensor:
    """Each block's queries side by side."""
    rows, queries, heads, width = q_BTHD.shape
    groups = k_BSGD.shape[2]
    q_BGTJD = q_BTHD.unflatten(2, (groups, -1)).transpose(1, 2)
    q_NTJD = q_BGTJD.reshape(-1, queries, heads // groups, width)
    k_NSD, v_NSD = (x.transpose(1, 2).reshape(-1, x.shape[1], width) for x in (k_BSGD, v_BSGD))
    place_NT = cache_position_BT.expand(rows, -1).repeat_interleave(groups, 0)
    y_NTJD, _ = _attend(q_NTJD, k_NSD, v_NSD, begins_BGTC.flatten(0, 1), place_NT, size)
    return y_NTJD.unflatten(0, (rows, groups)).transpose(1, 2).flatten(2, 3)


def torch_forward(
    q_NTJD: Tensor,
    k_NSD: Tensor,
    v_NSD: Tensor,
    begins_NTC: Tensor,
    cache_position_NT: Tensor,
    size: int,
) -> tuple[Tensor, Tensor]:
    """y (N, T, J, D) in the dtype of q; log-sum-exp of the scores (N, T, J), -inf of none."""
    kind = at_least_fp32(q_NTJD.dtype)
    y_NTJD = torch.zeros_like(q_NTJD)
    level_NTJ = q_NTJD.new_zeros(q_NTJD.shape[:3], dtype=kind)
    with torch.autocast(q_NTJD.device.type, enabled=False):
        for n in range(len(q_NTJD)):
            q_TJD, k_SD, v_SD = _scaled(q_NTJD[n]), k_NSD[n].to(kind), v_NSD[n].to(kind)
            sum_TJD = torch.zeros_like(q_TJD)
            peak_TJ1 = q_TJD.new_full((*q_TJD.shape[:2], 1), -math.inf)
            total_TJ1 = torch.zeros_like(peak_TJ1)
            for block, query_P in _visits(begins_NTC[n], size, len(k_SD)):
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
            # Whoever chose a block has a total of at least 1: the weight of its largest score.
            total_TJ1.clamp_(min=1)
            y_NTJD[n] = sum_TJD / total_TJ1
            level_NTJ[n] = (peak_TJ1 + total_TJ1.log())[..., 0]
    return y_NTJD, level_NTJ


def torch_backward(
    dy_NTJD: Tensor,
    y_NTJD: Tensor,
    level_NTJ: Tensor,
    q_NTJD: Tensor,
    k_NSD: Tensor,
    v_NSD: Tensor,
    begins_NTC: Tensor,
    cache_position_NT: Tensor,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dV = P^T dY; dP = dY V^T; dS = P (dP - rowsum(dY Y)); dQ = dS K and dK = dS^T Q, scaled."""
    kind = at_least_fp32(q_NTJD.dtype)
    dq_NTJD, dk_NSD, dv_NSD = (torch.zeros_like(x) for x in (q_NTJD, k_NSD, v_NSD))
    with torch.autocast(q_NTJD.device.type, enabled=False):
        for n in range(len(q_NTJD)):
            q_TJD, k_SD, v_SD = _scaled(q_NTJD[n]), k_NSD[n].to(kind), v_NSD[n].to(kind)
            dy_TJD, level_TJ1 = dy_NTJD[n].to(kind), level_NTJ[n, ..., None]
            along_TJ1 = (dy_TJD * y_NTJD[n]).sum(-1, keepdim=True)
            dq_TJD, dk_SD, dv_SD = (torch.zeros_like(x) for x in (q_TJD, k_SD, v_SD))
            for block, query_P in _visits(begins_NTC[n], size, len(k_SD)):
                q_PJD, dy_XD = q_TJD[query_P], dy_TJD[query_P].flatten(0, 1)
                scores_PJK = _scores(q_PJD, k_SD, block, cache_position_NT[n, query_P], size)
                weights_PJK = scores_PJK.sub_(level_TJ1[query_P]).exp_()
                slope_PJK = (dy_XD @ v_SD[block].mT).view_as(weights_PJK)
                slope_PJK.sub_(along_TJ1[query_P]).mul_(weights_PJK)
                slope_XK, weights_XK = slope_PJK.flatten(0, 1), weights_PJK.flatten(0, 1)
                dq_TJD[query_P] += (slope_XK @ k_SD[block]).view_as(q_PJD)
                dk_SD[block].addmm_(slope_XK.mT, q_PJD.flatten(0, 1))
                dv_SD[block].addmm_(weights_XK.mT, dy_XD)
            dq_NTJD[n] = dq_TJD.div_(math.sqrt(q_TJD.shape[-1]))
            dk_NSD[n], dv_NSD[n] = dk_SD, dv_SD
    return dq_NTJD, dk_NSD, dv_NSD


def _visits(begins_TC: Tensor, size: int, keys: int) -> Iterator[tuple[slice, Tensor]]:
    """Every chosen block of keys with the queries that chose it, first queries first, at most
    QUERY_CHUNK of them at a time. No query comes twice with one block.
    """
    sorted_X, order_X = begins_TC.flatten().sort(stable=True)
    begins, counts = sorted_X.unique_consecutive(return_counts=True)
    query_X = order_X // max(begins_TC.shape[1], 1)
    for begin, queries in zip(begins.tolist(), query_X.split(counts.tolist()), strict=True):
        if begin >= 0:
            block = slice(begin, min(begin + size, keys))
            for query_P in queries.split(QUERY_CHUNK):
                yield block, query_P


def _scores(q_PJD: Tensor, k_SD: Tensor, block: slice, place_P: Tensor, size: int) -> Tensor:
    """(P, J, K), -inf for keys after the query. Only queries inside the block have such keys: they
    are the first, and no more than `size`.
    """
    k_KD = k_SD[block]
    scores_PJK = (q_PJD.flatten(0, 1) @ k_KD.mT).view(*q_PJD.shape[:2], -1)
    place_K = torch.arange(block.start, block.stop, device=place_P.device)
    later = place_K > place_P[:size, None, None]
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
    if not _in_triton(q_NTJD):
        return torch_forward(q_NTJD, *rest)
    from tinsmith.nn.kernels import selected

    return selected.forward(q_NTJD, *rest)


@_backward.register_kernel("cuda")
def _(dy_NTJD: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    if not _in_triton(dy_NTJD):
        return torch_backward(dy_NTJD, *rest)
    from tinsmith.nn.kernels import selected

    return selected.backward(dy_NTJD, *rest)


def _in_triton(x: Tensor) -> bool:
    """The kernels sum in float32."""
    return x.dtype != torch.float64 and importlib.util.find_spec("triton") is not None


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=at_least_fp32(q.dtype))


@_backward.register_fake
def _(dy: Tensor, y: Tensor, level: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.size = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)


def _gradients(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *_backward(dy, *ctx.saved_tensors, ctx.size), None, None, None


_attend.register_autograd(_gradients, setup_context=_keep)

"""Attention over selected blocks on a GPU: the operators of `attention.block_sparse`, in Triton.

Forward and the gradient of queries: one program a query and group, which walks through its blocks
with a running log-sum-exp (the kernel of NSA, 2502.11089, section 3.4). The gradient of keys and
values: one program a block, which walks through the queries that chose it, found by sorting (the
order of FSA, 2508.18224), so nothing is added atomically. Sums are float32.

Legend: N rows times groups, T queries, S keys, J query heads per group, D width, C chosen blocks.
In kernels: a size with P is rounded up to a power of two, at least 16, as products want it.
"""

import math
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

MIN_TILE = 16
QUERY_TILE = 64
"""Rows of queries and heads that a block is multiplied with at a time."""


def forward(
    q_NTJD: Tensor,
    k_NSD: Tensor,
    v_NSD: Tensor,
    begins_NTC: Tensor,
    cache_position_NT: Tensor,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Compute `attention.block_sparse.torch_forward` in Triton."""
    rows, queries, heads, width = q_NTJD.shape
    y_NTJD = torch.empty_like(q_NTJD, memory_format=torch.contiguous_format)
    level_NTJ = q_NTJD.new_empty(q_NTJD.shape[:3], dtype=torch.float32)
    _launch(
        _forward,
        (queries, rows),
        *(x.contiguous() for x in (q_NTJD, k_NSD, v_NSD, begins_NTC, cache_position_NT)),
        y_NTJD,
        level_NTJ,
        1 / math.sqrt(width),
        *(queries, k_NSD.shape[1], begins_NTC.shape[2]),
        **_sizes(heads, width, size),
    )
    return y_NTJD, level_NTJ


def backward(
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
    """Compute `attention.block_sparse.torch_backward` in Triton."""
    rows, queries, heads, width = q_NTJD.shape
    keys, count = k_NSD.shape[1], begins_NTC.shape[2]
    along_NTJ = (dy_NTJD.float() * y_NTJD).sum(-1)
    given = (dy_NTJD, along_NTJ, level_NTJ, q_NTJD, k_NSD, v_NSD)
    given = tuple(x.contiguous() for x in given)
    dq_NTJD, dk_NSD, dv_NSD = (torch.zeros_like(x) for x in given[3:])
    scale, sizes = 1 / math.sqrt(width), _sizes(heads, width, size)
    begins_NTC, cache_position_NT = begins_NTC.contiguous(), cache_position_NT.contiguous()
    more = (begins_NTC, cache_position_NT, dq_NTJD, scale, queries, keys, count)
    _launch(_backward_queries, (queries, rows), *given, *more, **sizes)
    sorted_NX, order_NX = begins_NTC.flatten(1).sort(stable=True)
    edges = torch.arange(keys + 1, device=q_NTJD.device).expand(rows, -1).contiguous()
    first_NS = torch.searchsorted(sorted_NX, edges)
    requested_NX = (order_NX // max(count, 1)).contiguous()
    more = (
        requested_NX,
        first_NS,
        cache_position_NT,
        dk_NSD,
        dv_NSD,
        scale,
        queries,
        keys,
        requested_NX.shape[1],
    )
    many = max(QUERY_TILE // sizes["JP"], 1)
    _launch(_backward_keys, (keys, rows), *given, *more, **sizes, MANY=many)
    return dq_NTJD, dk_NSD, dv_NSD


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **sizes: int) -> None:
    kernel[grid](*arguments, **sizes)


def _sizes(heads: int, width: int, size: int) -> dict[str, int]:
    rounded = {
        name: max(MIN_TILE, 1 << (number - 1).bit_length())
        for name, number in (("JP", heads), ("DP", width), ("KP", size))
    }
    return {"J": heads, "D": width, "SIZE": size} | rounded


@triton.jit
def _tile(base, row, there, D: tl.constexpr, DP: tl.constexpr):
    """Rows of width D, 0 where they are not there."""
    d = tl.arange(0, DP)
    return tl.load(
        base + row[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0
    )


@triton.jit
def _store(base, row, there, x, D: tl.constexpr, DP: tl.constexpr):
    d = tl.arange(0, DP)
    tl.store(base + row[:, None] * D + d[None, :], x, mask=there[:, None] & (d < D)[None, :])


@triton.jit
def _forward(
    q, k, v, begins, place, y, level, scale, T, S, C,
    J: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
    JP: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    t, n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    j, s = tl.arange(0, JP), tl.arange(0, KP)
    head = (n * T + t) * J + j
    q_JD = _tile(q, head, j < J, D, DP)
    here = tl.load(place + n * T + t)
    peak_J = tl.full((JP,), float("-inf"), tl.float32)
    total_J = tl.zeros((JP,), tl.float32)
    sum_JD = tl.zeros((JP, DP), tl.float32)
    for c in range(C):
        begin = tl.load(begins + (n * T + t) * C + c)
        if begin >= 0:
            at = begin + s
            seen = (s < SIZE) & (at < S) & (at <= here)
            k_KD = _tile(k, n * S + at, seen, D, DP)
            scores_JK = tl.dot(q_JD, tl.trans(k_KD), input_precision="ieee") * scale
            scores_JK = tl.where(seen[None, :], scores_JK, float("-inf"))
            new_J = tl.maximum(peak_J, tl.max(scores_JK, 1))
            weights_JK = tl.exp(scores_JK - new_J[:, None])
            shrink_J = tl.exp(peak_J - new_J)
            v_KD = _tile(v, n * S + at, seen, D, DP)
            added_JD = tl.dot(weights_JK.to(v_KD.dtype), v_KD, input_precision="ieee")
            sum_JD = sum_JD * shrink_J[:, None] + added_JD
            total_J = total_J * shrink_J + tl.sum(weights_JK, 1)
            peak_J = new_J
    total_J = tl.maximum(total_J, 1.0)  # 1 is the weight of the largest score
    _store(y, head, j < J, sum_JD / total_J[:, None], D, DP)
    tl.store(level + head, peak_J + tl.log(total_J), mask=j < J)


@triton.jit
def _slopes(q_XD, dy_XD, along_X, level_X, k_KD, v_KD, seen_XK, scale):
    """The weights once more, and the slopes of their scores."""
    scores_XK = tl.dot(q_XD, tl.trans(k_KD), input_precision="ieee") * scale
    weights_XK = tl.where(seen_XK, tl.exp(scores_XK - level_X[:, None]), 0.0)
    slope_XK = tl.dot(dy_XD, tl.trans(v_KD), input_precision="ieee") - along_X[:, None]
    return weights_XK, weights_XK * slope_XK


@triton.jit
def _backward_queries(
    dy, along, level, q, k, v, begins, place, dq, scale, T, S, C,
    J: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
    JP: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    t, n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    j, s = tl.arange(0, JP), tl.arange(0, KP)
    head = (n * T + t) * J + j
    q_JD, dy_JD = _tile(q, head, j < J, D, DP), _tile(dy, head, j < J, D, DP)
    along_J = tl.load(along + head, mask=j < J, other=0.0)
    level_J = tl.load(level + head, mask=j < J, other=0.0)
    here = tl.load(place + n * T + t)
    sum_JD = tl.zeros((JP, DP), tl.float32)
    for c in range(C):
        begin = tl.load(begins + (n * T + t) * C + c)
        if begin >= 0:
            at = begin + s
            seen = (s < SIZE) & (at < S) & (at <= here)
            k_KD, v_KD = _tile(k, n * S + at, seen, D, DP), _tile(v, n * S + at, seen, D, DP)
            both = (j < J)[:, None] & seen[None, :]
            _, slope_JK = _slopes(q_JD, dy_JD, along_J, level_J, k_KD, v_KD, both, scale)
            sum_JD += tl.dot(slope_JK.to(k_KD.dtype), k_KD, input_precision="ieee")
    _store(dq, head, j < J, sum_JD * scale, D, DP)


@triton.jit
def _backward_keys(
    dy, along, level, q, k, v, requested, first, place, dk, dv, scale, T, S, X,
    J: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
    JP: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """The block that begins at a place, if any query chose it."""
    begin, n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    low = tl.load(first + n * (S + 1) + begin)
    high = tl.load(first + n * (S + 1) + begin + 1)
    if low < high:
        s, x = tl.arange(0, KP), tl.arange(0, MANY * JP)
        at, j = begin + s, x % JP
        whole = (s < SIZE) & (at < S)
        k_KD, v_KD = _tile(k, n * S + at, whole, D, DP), _tile(v, n * S + at, whole, D, DP)
        dk_KD, dv_KD = tl.zeros((KP, DP), tl.float32), tl.zeros((KP, DP), tl.float32)
        last = begin - begin - 1
        for i in range(low, high, MANY):
            turn = i + x // JP
            there = (turn < high) & (j < J)
            t = tl.load(requested + n * X + turn, mask=there, other=0)
            here_X = tl.load(place + n * T + t, mask=there, other=-1).to(tl.int64)
            head = (n * T + t) * J + j
            q_XD, dy_XD = _tile(q, head, there, D, DP), _tile(dy, head, there, D, DP)
            along_X = tl.load(along + head, mask=there, other=0.0)
            level_X = tl.load(level + head, mask=there, other=0.0)
            seen = there[:, None] & whole[None, :] & (at[None, :] <= here_X[:, None])
            weights, slope = _slopes(q_XD, dy_XD, along_X, level_X, k_KD, v_KD, seen, scale)
            dk_KD += tl.dot(tl.trans(slope).to(q_XD.dtype), q_XD, input_precision="ieee")
            dv_KD += tl.dot(tl.trans(weights).to(dy_XD.dtype), dy_XD, input_precision="ieee")
            last = tl.maximum(last, tl.max(here_X, 0))
        # What lies beyond the last query belongs to another document, and to its programs.
        mine = whole & (at <= last)
        _store(dk, n * S + at, mine, dk_KD * scale, D, DP)
        _store(dv, n * S + at, mine, dv_KD, D, DP)

"""Selection of blocks of tokens by the attention that a query pays to compressed blocks (NSA,
2502.11089, equations 9 and 10).

    p'_t[j] = sum_{m < l'/d} sum_{n < l/d} p_t[l'/d j + m - n]        summed over a group's heads

p_t are the attention weights over the compressed blocks visible to the query, l and d their size
and stride, l' the size of the blocks to select, all counted from the first token of the query's
document. A compressed block counts for block j once for each stretch of d tokens that they share.

A query's own block, the document's first and the one before its own are always selected, in this
order if `count` is less than 3. The others are those with the largest p', ties by index. Selection
has no gradient: compression is trained through its own output.

Legend: B rows, T queries, Q queries of a chunk, H query heads, G groups, J heads per group, D head
width, N compressed blocks, K those that are visible to a chunk, M blocks to select from, C selected
blocks.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.nn.attention.compress import BlockLayout, BlockPositions
from tinsmith.nn.layers.stable_topk import stable_topk
from tinsmith.nn.precision import at_least_fp32

QUERY_CHUNK = 128
"""Queries whose attention weights are stored at a time."""
FORCED_SCORE = 2.0**21
"""Above every p', and small enough that `stable_topk` distinguishes FORCED_SCORE + 1 and + 2."""


def select_blocks(
    q_BTHD: Tensor,
    k_BNGD: Tensor,
    layout: BlockLayout,
    positions: BlockPositions,
    *,
    keys: int,
    size: int,
    count: int,
) -> Tensor:
    """Return (B, G, T, C): the positions at which the selected blocks of `size` of the row's `keys`
    tokens begin, -1 for none. C is `count`, or the number of blocks if there are fewer.
    """
    count = min(count, -(-keys // size))
    q_BTHD, k_BNGD = q_BTHD.detach(), k_BNGD.detach()
    return _select(
        q_BTHD, k_BNGD, positions.cache_position_BT, positions.start_BT, [*layout], size, count
    )


@torch.library.custom_op("tinsmith::select_blocks", mutates_args=())
def _select(
    q_BTHD: Tensor,
    k_BNGD: Tensor,
    position_BT: Tensor,
    start_BT: Tensor,
    size_and_stride: list[int],
    size: int,
    count: int,
) -> Tensor:
    rows, queries = q_BTHD.shape[:2]
    layout = BlockLayout(*size_and_stride)
    k_BGND = k_BNGD.transpose(1, 2).to(at_least_fp32(q_BTHD.dtype)).contiguous()
    begins_BGTC = position_BT.new_full((rows, k_BNGD.shape[2], queries, count), -1)
    with torch.autocast(q_BTHD.device.type, enabled=False):
        for start in range(0, queries if rows else 0, QUERY_CHUNK):
            part = slice(start, start + QUERY_CHUNK)
            chunk = BlockPositions(position_BT[:, part], start_BT[:, part])
            weights_BGQK, first = _weights(q_BTHD[:, part].to(k_BGND.dtype), k_BGND, layout, chunk)
            own_BQ = (chunk.cache_position_BT - chunk.start_BT) // size
            offset_BQ = layout.visible_blocks(chunk)[0] - first
            scores = _importance(weights_BGQK, offset_BQ, layout, size, int(own_BQ.max()) + 1)
            block_BGQC = _top_blocks(scores, own_BQ, count)
            begin = chunk.start_BT[:, None, :, None] + block_BGQC * size
            begins = begin.where(block_BGQC >= 0, -1)
            begins_BGTC[:, :, part, : begins.shape[-1]] = begins
    return begins_BGTC


@_select.register_fake
def _(q: Tensor, k: Tensor, position: Tensor, start: Tensor, _: Any, size: int, count: int) -> Any:
    return position.new_empty(q.shape[0], k.shape[2], q.shape[1], count)


def _weights(
    q_BQHD: Tensor, k_BGND: Tensor, layout: BlockLayout, positions: BlockPositions
) -> tuple[Tensor, int]:
    """Return the attention weights (B, G, Q, K) of a chunk's queries over the blocks that any of
    them attends to, summed over heads, and the slot of the first of these blocks.
    """
    rows, queries, _, width = q_BQHD.shape
    groups, slots = k_BGND.shape[1:3]
    low_BQ, count_BQ = layout.visible_blocks(positions)
    has_blocks = count_BQ > 0
    first = int(low_BQ.where(has_blocks, slots).min())
    last = int((low_BQ + count_BQ).where(has_blocks, 0).max())
    if first >= last:
        return q_BQHD.new_zeros(rows, groups, queries, 0), 0
    q_BGXD = q_BQHD.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores_BGXK = q_BGXD @ k_BGND[:, :, first:last].mT / math.sqrt(width)
    slot = torch.arange(first, last, device=low_BQ.device)
    low, high = low_BQ[..., None], (low_BQ + count_BQ)[..., None]
    hidden_BQK = (slot < low) | (slot >= high)
    lowest = torch.finfo(scores_BGXK.dtype).min
    scores_BGJQK = scores_BGXK.unflatten(2, (-1, queries))
    weights = scores_BGJQK.masked_fill_(hidden_BQK[:, None, None], lowest).softmax(-1)
    # Weights of a query without visible blocks are arbitrary: it can only select its own block.
    return weights.sum(2), first


def _importance(
    weights_BGQK: Tensor, offset_BQ: Tensor, layout: BlockLayout, size: int, candidates: int
) -> Tensor:
    """Return p' (B, G, Q, M) of each block to select from. `offset` is the index among the K blocks
    of the first one of the query's document.
    """
    per_block, per_candidate = layout.size // layout.stride, size // layout.stride
    padded = F.pad(weights_BGQK, (per_block - 1, per_block))
    stretch_sums = padded.unfold(-1, per_block, 1).sum(-1)  # per d tokens; the last is 0
    stretch = torch.arange(candidates * per_candidate, device=offset_BQ.device)
    stretch = stretch + offset_BQ[..., None]
    none = stretch_sums.shape[-1] - 1
    stretch = stretch.where((stretch >= 0) & (stretch < none), none)
    index = stretch[:, None].expand(*weights_BGQK.shape[:3], -1)
    return stretch_sums.gather(-1, index).unflatten(-1, (candidates, per_candidate)).sum(-1)


def _top_blocks(scores_BGQM: Tensor, own_BQ: Tensor, count: int) -> Tensor:
    """Return (B, G, Q, C): the indices of the selected blocks, -1 if fewer exist. A query whose own
    block is negative (padding) selects none.
    """
    own = own_BQ[:, None, :, None]
    index = torch.arange(scores_BGQM.shape[-1], device=own.device)
    scores = scores_BGQM.masked_fill(index == own - 1, FORCED_SCORE)
    scores = scores.masked_fill((index == 0).expand_as(scores), FORCED_SCORE + 1)
    scores = scores.masked_fill(index == own, FORCED_SCORE + 2).masked_fill(index > own, -torch.inf)
    selected = stable_topk(scores, count)
    return selected.where(selected <= own, -1)

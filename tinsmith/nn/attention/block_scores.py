"""Which blocks of raw tokens a query reads, by the attention it pays to compressed blocks (NSA,
2502.11089, equations 9 and 10).

    p'_t[j] = sum_{m < l'/d} sum_{n < l/d} p_t[l'/d j + m - n]        summed over a group's heads

p_t are the query's weights over the compressed blocks it sees, l and d their size and stride, l'
the size of the blocks to choose from, all counted from the first token of the query's document. In
words: a compressed block counts for block j once for each stretch of d tokens that they share.

A query's own block, the document's first and the one before its own are always chosen, in this
order where `count` has no room for all three; then the largest p', ties by index. Choices carry no
gradient: compression learns through its own output.

Legend: B rows, T queries, Q queries of a chunk, H query heads, G groups, J heads per group, D head
width, N compressed blocks, K those that a chunk sees, M blocks to choose from, C chosen blocks.
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
"""Queries whose weights are held at a time."""
FORCED_SCORE = 2.0**21
"""Above every importance, and within what `choose` tells apart."""


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
    """(B, G, T, C): the places at which the chosen blocks of `size` of the row's `keys` tokens
    begin, -1 for none. C is `count`, or less where there are fewer blocks.
    """
    count = min(count, -(-keys // size))
    q_BTHD, k_BNGD = q_BTHD.detach(), k_BNGD.detach()
    return _choose(
        q_BTHD, k_BNGD, positions.cache_position_BT, positions.start_BT, [*layout], size, count
    )


@torch.library.custom_op("tinsmith::choose_blocks", mutates_args=())
def _choose(
    q_BTHD: Tensor,
    k_BNGD: Tensor,
    place_BT: Tensor,
    start_BT: Tensor,
    cut: list[int],
    size: int,
    count: int,
) -> Tensor:
    rows, queries = q_BTHD.shape[:2]
    blocks = BlockLayout(*cut)
    k_BGND = k_BNGD.transpose(1, 2).to(at_least_fp32(q_BTHD.dtype)).contiguous()
    begins_BGTC = place_BT.new_full((rows, k_BNGD.shape[2], queries, count), -1)
    with torch.autocast(q_BTHD.device.type, enabled=False):
        for start in range(0, queries if rows else 0, QUERY_CHUNK):
            part = slice(start, start + QUERY_CHUNK)
            at = BlockPositions(place_BT[:, part], start_BT[:, part])
            mass_BGQK, first = _mass(q_BTHD[:, part].to(k_BGND.dtype), k_BGND, blocks, at)
            own_BQ = (at.cache_position_BT - at.start_BT) // size
            offset_BQ = blocks.visible_blocks(at)[0] - first
            scores = _importance(mass_BGQK, offset_BQ, blocks, size, int(own_BQ.max()) + 1)
            chosen_BGQC = _best(scores, own_BQ, count)
            begin = at.start_BT[:, None, :, None] + chosen_BGQC * size
            found = begin.where(chosen_BGQC >= 0, -1)
            begins_BGTC[:, :, part, : found.shape[-1]] = found
    return begins_BGTC


@_choose.register_fake
def _(q: Tensor, k: Tensor, place: Tensor, start: Tensor, cut: Any, size: int, count: int) -> Any:
    return place.new_empty(q.shape[0], k.shape[2], q.shape[1], count)


def _mass(
    q_BQHD: Tensor, k_BGND: Tensor, blocks: BlockLayout, at: BlockPositions
) -> tuple[Tensor, int]:
    """(B, G, Q, K): the weights of a chunk's queries over the blocks that any of them sees, summed
    over heads; and the slot of the first of those.
    """
    rows, queries, _, width = q_BQHD.shape
    groups, slots = k_BGND.shape[1:3]
    low_BQ, count_BQ = blocks.visible_blocks(at)
    some = count_BQ > 0
    first = int(low_BQ.where(some, slots).min())
    last = int((low_BQ + count_BQ).where(some, 0).max())
    if first >= last:
        return q_BQHD.new_zeros(rows, groups, queries, 0), 0
    q_BGXD = q_BQHD.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores_BGXK = q_BGXD @ k_BGND[:, :, first:last].mT / math.sqrt(width)
    slot = torch.arange(first, last, device=low_BQ.device)
    low, high = low_BQ[..., None], (low_BQ + count_BQ)[..., None]
    hidden_BQK = (slot < low) | (slot >= high)
    least = torch.finfo(scores_BGXK.dtype).min
    scores_BGJQK = scores_BGXK.unflatten(2, (-1, queries))
    weights = scores_BGJQK.masked_fill_(hidden_BQK[:, None, None], least).softmax(-1)
    # A query that sees none weighs at random: it has no block but its own to choose.
    return weights.sum(2), first


def _importance(
    mass_BGQK: Tensor, offset_BQ: Tensor, blocks: BlockLayout, size: int, candidates: int
) -> Tensor:
    """(B, G, Q, M): p' of each block to choose from; the first block of a query's document is at
    `offset` of the K.
    """
    shared, each = blocks.size // blocks.stride, size // blocks.stride
    padded = F.pad(mass_BGQK, (shared - 1, shared))
    touched = padded.unfold(-1, shared, 1).sum(-1)  # per stretch of d tokens; the last is 0
    stretch = torch.arange(candidates * each, device=offset_BQ.device) + offset_BQ[..., None]
    none = touched.shape[-1] - 1
    stretch = stretch.where((stretch >= 0) & (stretch < none), none)
    index = stretch[:, None].expand(*mass_BGQK.shape[:3], -1)
    return touched.gather(-1, index).unflatten(-1, (candidates, each)).sum(-1)


def _best(scores_BGQM: Tensor, own_BQ: Tensor, count: int) -> Tensor:
    """(B, G, Q, C): the numbers of the chosen blocks, -1 where fewer exist; a query whose own
    block is below 0 chooses none.
    """
    own = own_BQ[:, None, :, None]
    index = torch.arange(scores_BGQM.shape[-1], device=own.device)
    scores = scores_BGQM.masked_fill(index == own - 1, FORCED_SCORE)
    scores = scores.masked_fill((index == 0).expand_as(scores), FORCED_SCORE + 1)
    scores = scores.masked_fill(index == own, FORCED_SCORE + 2).masked_fill(index > own, -torch.inf)
    chosen = stable_topk(scores, count)
    return chosen.where(chosen <= own, -1)

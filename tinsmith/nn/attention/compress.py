"""Blocks of tokens that a mixer pools into one: which exist, where each ends, who sees them.

A document's block i is its tokens [i d, i d + l), counted from the document's first token; l is the
size, d the stride, d divides l. It exists, and is seen by token t, once its last token is <= t.
What is pooled, and how, is the mixer's business.

Slots: the ends of two blocks of one row lie at least d places apart, also across documents (a
document's first block ends l >= d places after anything before it). So the block that ends at place
p has slot floor((p + 1) / d) - l / d for itself: block i of a row that is one document is in slot
i, the blocks of one document are neighbours, and the number of slots depends on lengths alone,
wherever documents begin. What a query sees is an interval of slots; slots outside it may hold
anything finite.

Legend: B rows, T tokens of this call, S keys, N slots, L tokens of a block, E blocks that ended.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tinsmith.nn.attention.cache import KVCache, RotatingKVCache
from tinsmith.nn.attention.core import attend
from tinsmith.nn.attention.span import INF, Span
from tinsmith.nn.contract import CannotTruncate


class BlockPositions(NamedTuple):
    """Where queries stand in their rows: (B or 1, T) each."""

    cache_position_BT: Tensor
    """-1 for padding that takes no place: it sees no block."""
    start_BT: Tensor
    """Place of the first token of the same document."""


def block_positions(span: Span, queries: int, keys: int, device: torch.device) -> BlockPositions:
    """From what queries see of all tokens before them: `reach` without a window, or an `Append`."""
    if span.low_BT is None or span.high_BT is None:
        place = torch.arange(keys - queries, keys, device=device)[None]
        return BlockPositions(place, torch.zeros_like(place))
    real = span.high_BT < INF
    return BlockPositions(span.high_BT.where(real, -1), span.low_BT.where(real, 0))


class BlockLayout(NamedTuple):
    """The rule that cuts documents into blocks."""

    size: int
    stride: int

    def num_slots(self, length: int) -> int:
        """Slots of a row of `length` tokens."""
        return max((length - self.size) // self.stride + 1, 0)

    def slot_index(self, cache_position: Tensor) -> Tensor:
        """Where the block is kept whose last token is at `place`."""
        return (cache_position + 1) // self.stride - self.size // self.stride

    def block_ends(self, positions: BlockPositions) -> Tensor:
        """(B or 1, T) bool: a block of its document ends with this token."""
        beyond = positions.cache_position_BT - positions.start_BT + 1 - self.size
        return (beyond >= 0) & (beyond % self.stride == 0)

    def visible_blocks(self, positions: BlockPositions) -> tuple[Tensor, Tensor]:
        """(B or 1, T) each: the slot of the document's first block, and how many blocks from there
        on each token sees.
        """
        beyond = positions.cache_position_BT - positions.start_BT + 1 - self.size
        count = (beyond // self.stride + 1).clamp(min=0)
        return self.slot_index(positions.start_BT + self.size - 1), count

    def gather_blocks(self, x_BTX: Tensor, span: Span) -> Tensor:
        """(B, T, ...) -> (B, N, L, ...): the tokens of the block in each slot; in an empty slot,
        some tokens. `seen` is what tokens see of each other.
        """
        length = x_BTX.shape[1]
        slots = self.num_slots(length)
        if not slots:
            return x_BTX[:, :0, None].expand(-1, 0, self.size, *x_BTX.shape[2:])
        if span.is_causal:
            return x_BTX.unfold(1, self.size, self.stride).movedim(-1, 2)
        first_BN = (
            self._last_tokens(block_positions(span, length, length, x_BTX.device)) - self.size + 1
        )
        index_BNL = first_BN[..., None] + torch.arange(self.size, device=x_BTX.device)
        row = torch.arange(len(x_BTX), device=x_BTX.device)[:, None, None]
        flat = (row * length + index_BNL).flatten()
        picked = x_BTX.flatten(0, 1).index_select(0, flat)
        return picked.view(len(x_BTX), slots, self.size, *x_BTX.shape[2:])

    def _last_tokens(self, at: BlockPositions) -> Tensor:
        """(B, N): the place in each slot's span of d places where a block ends; if none does, the
        first.
        """
        length = at.cache_position_BT.shape[1]
        begin = (
            torch.arange(self.num_slots(length), device=at.cache_position_BT.device) * self.stride
        )
        span_ND = begin[:, None] + self.size - 1 + torch.arange(self.stride, device=begin.device)
        ended_BND = self.block_ends(at)[:, span_ND.clamp(max=length - 1)] & (span_ND < length)
        return begin + self.size - 1 + ended_BND.int().argmax(-1)


class CompletedBlocks(NamedTuple):
    """Blocks that ended with one of the tokens of a call."""

    row_E: Tensor
    column_E: Tensor
    """Which token of the call each ended with."""
    slot_E: Tensor
    tokens: list[Tensor]
    """(E, L, ...) each: what was remembered of the tokens of each block."""


class BlockCache:
    """Remembers pooled blocks, and of the last `size` tokens what is to be pooled."""

    def __init__(
        self,
        layout: BlockLayout,
        batch_size: int,
        capacity: int,
        shapes: list[tuple[int, ...]],
        pooled: list[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.layout = layout
        self.recent_tokens = RotatingKVCache(
            batch_size, capacity, layout.size, shapes, dtype, device
        )
        self.pooled_blocks = KVCache(batch_size, layout.num_slots(capacity), pooled, dtype, device)

    def append(
        self, segments_BT: Tensor | None, positions: BlockPositions, *new: Tensor
    ) -> CompletedBlocks:
        """Take in (B, T, ...) tensors; return the blocks to pool and `keep`."""
        held, seen = self.recent_tokens.append(segments_BT, *new)
        row, column = (
            self.layout.block_ends(positions).expand(new[0].shape[:2]).nonzero(as_tuple=True)
        )
        place_E = positions.cache_position_BT.expand(new[0].shape[:2])[row, column]
        back_L = torch.arange(self.layout.size - 1, -1, -1, device=row.device)
        if seen.key_positions_BS is not None:
            index_EL = (place_E[:, None] - back_L) % self.recent_tokens.slots
        elif seen.high_BT is not None:
            index_EL = seen.high_BT[row, column, None] - back_L
        else:
            index_EL = place_E[:, None] - back_L
        tokens = [tensor[row[:, None], index_EL] for tensor in held]
        return CompletedBlocks(row, column, self.layout.slot_index(place_E), tokens)

    def append_blocks(self, completed: CompletedBlocks, *pooled: Tensor) -> list[Tensor]:
        """Store what became of blocks that ended, (E, ...) each; return all, (B, N, ...) each."""
        for tensor, fresh in zip(self.pooled_blocks.tensors, pooled, strict=True):
            tensor[completed.row_E, completed.slot_E] = fresh.to(tensor.dtype)
        used = self.layout.num_slots(self.recent_tokens.row_state.max_length)
        return [tensor[:, :used] for tensor in self.pooled_blocks.tensors]

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows."""
        self.recent_tokens.select(rows)
        self.pooled_blocks.select(rows)

    def check_truncate(self, lengths: Tensor) -> None:
        """Raise where tokens of a block that has not ended yet would be missing."""
        rows, (size, stride) = self.recent_tokens.row_state, self.layout
        lengths = lengths.to(rows.lengths.device, torch.long)
        rows.check_truncate(lengths)
        ended = ((lengths - rows.document_starts - size) // stride + 1).clamp(min=0)
        needed = rows.document_starts + ended * stride
        dropped = (needed < rows.lengths - self.recent_tokens.slots) & (needed < lengths)
        if bool((dropped & (lengths < rows.lengths)).any()):
            raise CannotTruncate(
                f"a block of {size} tokens has already dropped its first ones: "
                "take the row in again from its start"
            )

    def truncate(self, lengths: Tensor) -> None:
        """Forget the newest tokens, or raise and change nothing; a block that is no more is seen by
        nobody until its slot is written again.
        """
        self.check_truncate(lengths)
        self.recent_tokens.row_state.truncate(
            lengths.to(self.recent_tokens.row_state.lengths.device, torch.long)
        )

    def join(self, other: "BlockCache") -> None:
        """Append the rows of `other`."""
        self.recent_tokens.join(other.recent_tokens)
        self.pooled_blocks.join(other.pooled_blocks)

    def nbytes(self) -> int:
        """Blocks and recent tokens."""
        return self.recent_tokens.nbytes() + self.pooled_blocks.nbytes()


def attend_compressed(
    q_BTHD: Tensor,
    k_BNGD: Tensor,
    v_BNGD: Tensor,
    layout: BlockLayout,
    positions: BlockPositions,
    *,
    kind: str = "sdpa",
    dropout: float = 0.0,
) -> Tensor:
    """Attention over the blocks that each query sees, (B, T, H, D); 0 where it sees none."""
    slots = k_BNGD.shape[1]
    if not slots:
        # A sum of no numbers: 0, yet what pools gets its gradient, which is 0.
        empty = q_BTHD.new_zeros(*q_BTHD.shape[:3], v_BNGD.shape[-1])
        return empty + (k_BNGD.sum() + v_BNGD.sum())
    first_BT, count_BT = layout.visible_blocks(positions)
    low = first_BT.clamp(max=slots - 1)
    some = Span(low, (first_BT + count_BT - 1).maximum(low))
    y_BTHD = attend(q_BTHD, k_BNGD, v_BNGD, some, kind=kind, dropout=dropout)
    return y_BTHD.masked_fill((count_BT == 0)[..., None, None], 0)

"""Compressed attention (NSA): blocks of tokens that a mixer pools to one key and value each, where
they begin and end, and which queries attend to them.

A document's block i is its tokens [i d, i d + l), counted from the document's first token; l is the
size, d the stride, d divides l. It is complete and visible to token t if its last token is <= t.
The mixer defines the pooling.

Slots: the ends of two blocks of one row are at least d positions apart, also across documents (a
document's first block ends l >= d positions after anything before it). So each block has its own
slot, floor((p + 1) / d) - l / d for the block that ends at position p. Block i of a row that is one
document is in slot i, the blocks of one document are neighbours, and the number of slots depends on
lengths alone, wherever documents begin. A query attends to an interval of slots; slots outside it
hold arbitrary finite values.

Legend: B rows, T tokens of this call, S keys, N slots, L tokens of a block, E completed blocks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tinsmith.nn.attention.cache import KVCache, RotatingKVCache
from tinsmith.nn.attention.core import attend
from tinsmith.nn.attention.span import INF, Span
from tinsmith.nn.contract import CannotTruncate


class BlockPositions(NamedTuple):
    """Positions of queries in their rows, (B or 1, T) each."""

    cache_position_BT: Tensor
    """-1 for padding of a cached call, which attends to no block."""
    start_BT: Tensor
    """Position of the first token of the same document."""


def block_positions(span: Span, queries: int, keys: int, device: torch.device) -> BlockPositions:
    """Return the positions of queries from their span without a window."""
    if span.low_BT is None or span.high_BT is None:
        position = torch.arange(keys - queries, keys, device=device)[None]
        return BlockPositions(position, torch.zeros_like(position))
    is_valid = span.high_BT < INF
    return BlockPositions(span.high_BT.where(is_valid, -1), span.low_BT.where(is_valid, 0))


class BlockLayout(NamedTuple):
    """Size and stride of the blocks of a document."""

    size: int
    stride: int

    def num_slots(self, length: int) -> int:
        """Return the number of slots of a row of `length` tokens."""
        return max((length - self.size) // self.stride + 1, 0)

    def slot_index(self, cache_position: Tensor) -> Tensor:
        """Return the slot of the block whose last token is at `cache_position`."""
        return (cache_position + 1) // self.stride - self.size // self.stride

    def block_ends(self, positions: BlockPositions) -> Tensor:
        """Return (B or 1, T) bool: True where a block of its document ends with this token."""
        excess = positions.cache_position_BT - positions.start_BT + 1 - self.size
        return (excess >= 0) & (excess % self.stride == 0)

    def visible_blocks(self, positions: BlockPositions) -> tuple[Tensor, Tensor]:
        """Return (B or 1, T) each: the slot of the document's first block, and the number of blocks
        from there on that each token attends to.
        """
        excess = positions.cache_position_BT - positions.start_BT + 1 - self.size
        count = (excess // self.stride + 1).clamp(min=0)
        return self.slot_index(positions.start_BT + self.size - 1), count

    def gather_blocks(self, x_BTX: Tensor, span: Span) -> Tensor:
        """Return (B, N, L, ...): the tokens of the block in each slot, from x (B, T, ...) and the
        span of its tokens. An empty slot has arbitrary tokens.
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
        blocks = x_BTX.flatten(0, 1).index_select(0, flat)
        return blocks.view(len(x_BTX), slots, self.size, *x_BTX.shape[2:])

    def _last_tokens(self, positions: BlockPositions) -> Tensor:
        """Return (B, N): the last token of the block in each slot, which is one of d candidates. An
        empty slot has the first candidate.
        """
        length, device = positions.cache_position_BT.shape[1], positions.cache_position_BT.device
        first_N = torch.arange(self.num_slots(length), device=device) * self.stride + self.size - 1
        candidates_ND = first_N[:, None] + torch.arange(self.stride, device=device)
        is_end_BND = self.block_ends(positions)[:, candidates_ND.clamp(max=length - 1)]
        return first_N + (is_end_BND & (candidates_ND < length)).int().argmax(-1)


class CompletedBlocks(NamedTuple):
    """Blocks whose last token is in this call."""

    row_E: Tensor
    column_E: Tensor
    """Index of their last token in the call."""
    slot_E: Tensor
    tokens: list[Tensor]
    """Cached tensors of the tokens of each block, (E, L, ...) each."""


class BlockCache:
    """Holds pooled blocks, and the tensors to be pooled of the last `size` tokens."""

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
        """Append (B, T, ...) tensors. Return the completed blocks, to be pooled and passed to
        `append_blocks`.
        """
        stored, span = self.recent_tokens.append(segments_BT, *new)
        row, column = (
            self.layout.block_ends(positions).expand(new[0].shape[:2]).nonzero(as_tuple=True)
        )
        end_E = positions.cache_position_BT.expand(new[0].shape[:2])[row, column]
        offset_L = torch.arange(self.layout.size - 1, -1, -1, device=row.device)
        if span.key_positions_BS is not None:
            index_EL = (end_E[:, None] - offset_L) % self.recent_tokens.slots
        elif span.high_BT is not None:
            index_EL = span.high_BT[row, column, None] - offset_L
        else:
            index_EL = end_E[:, None] - offset_L
        tokens = [tensor[row[:, None], index_EL] for tensor in stored]
        return CompletedBlocks(row, column, self.layout.slot_index(end_E), tokens)

    def append_blocks(self, completed: CompletedBlocks, *pooled: Tensor) -> list[Tensor]:
        """Store the pooled tensors (E, ...) of completed blocks; return those of all slots, (B, N,
        ...) each.
        """
        for tensor, added in zip(self.pooled_blocks.tensors, pooled, strict=True):
            tensor[completed.row_E, completed.slot_E] = added.to(tensor.dtype)
        used = self.layout.num_slots(self.recent_tokens.row_state.max_length)
        return [tensor[:, :used] for tensor in self.pooled_blocks.tensors]

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows."""
        self.recent_tokens.select(rows)
        self.pooled_blocks.select(rows)

    def check_truncate(self, lengths: Tensor) -> None:
        """Raise CannotTruncate if the first tokens of an incomplete block have been dropped."""
        rows, (size, stride) = self.recent_tokens.row_state, self.layout
        lengths = lengths.to(rows.lengths.device, torch.long)
        rows.check_truncate(lengths)
        completed = ((lengths - rows.document_starts - size) // stride + 1).clamp(min=0)
        first_needed = rows.document_starts + completed * stride
        first_stored = rows.lengths - self.recent_tokens.slots
        is_dropped = (first_needed < first_stored) & (first_needed < lengths)
        if bool((is_dropped & (lengths < rows.lengths)).any()):
            raise CannotTruncate(
                f"a block of {size} tokens has already dropped its first ones: "
                "process the row again from its start"
            )

    def truncate(self, lengths: Tensor) -> None:
        """Remove the newest tokens, or raise CannotTruncate and change nothing. A removed block is
        not attended to until its slot is written again.
        """
        self.check_truncate(lengths)
        rows = self.recent_tokens.row_state
        rows.truncate(lengths.to(rows.lengths.device, torch.long))

    def join(self, other: "BlockCache") -> None:
        """Append the rows of `other`."""
        self.recent_tokens.join(other.recent_tokens)
        self.pooled_blocks.join(other.pooled_blocks)

    def nbytes(self) -> int:
        """Return the bytes of blocks and recent tokens."""
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
    """Return attention over the visible blocks of each query, (B, T, H, D); 0 if there is none."""
    slots = k_BNGD.shape[1]
    if not slots:
        # The sum over no block is 0 and gives the pooling weights a gradient of 0 instead of None.
        empty = q_BTHD.new_zeros(*q_BTHD.shape[:3], v_BNGD.shape[-1])
        return empty + (k_BNGD.sum() + v_BNGD.sum())
    first_BT, count_BT = layout.visible_blocks(positions)
    low = first_BT.clamp(max=slots - 1)
    span = Span(low, (first_BT + count_BT - 1).maximum(low))
    y_BTHD = attend(q_BTHD, k_BNGD, v_BNGD, span, kind=kind, dropout=dropout)
    return y_BTHD.masked_fill((count_BT == 0)[..., None, None], 0)

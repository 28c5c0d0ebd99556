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

from tinsmith.nn.contract import CannotRewind
from tinsmith.nn.parts.attend import FAR, Reach, attend
from tinsmith.nn.parts.cache import Append, Ring


class Spots(NamedTuple):
    """Where queries stand in their rows: (B or 1, T) each."""

    place_BT: Tensor
    """-1 for padding that takes no place: it sees no block."""
    start_BT: Tensor
    """Place of the first token of the same document."""


def spots(seen: Reach, queries: int, keys: int, device: torch.device) -> Spots:
    """From what queries see of all tokens before them: `reach` without a window, or an `Append`."""
    if seen.low_BT is None or seen.high_BT is None:
        place = torch.arange(keys - queries, keys, device=device)[None]
        return Spots(place, torch.zeros_like(place))
    real = seen.high_BT < FAR
    return Spots(seen.high_BT.where(real, -1), seen.low_BT.where(real, 0))


class Blocks(NamedTuple):
    """The rule that cuts documents into blocks."""

    size: int
    stride: int

    def slots(self, length: int) -> int:
        """Slots of a row of `length` tokens."""
        return max((length - self.size) // self.stride + 1, 0)

    def slot(self, place: Tensor) -> Tensor:
        """Where the block is kept whose last token is at `place`."""
        return (place + 1) // self.stride - self.size // self.stride

    def ends(self, at: Spots) -> Tensor:
        """(B or 1, T) bool: a block of its document ends with this token."""
        beyond = at.place_BT - at.start_BT + 1 - self.size
        return (beyond >= 0) & (beyond % self.stride == 0)

    def seen(self, at: Spots) -> tuple[Tensor, Tensor]:
        """(B or 1, T) each: the slot of the document's first block, and how many blocks from there
        on each token sees.
        """
        beyond = at.place_BT - at.start_BT + 1 - self.size
        count = (beyond // self.stride + 1).clamp(min=0)
        return self.slot(at.start_BT + self.size - 1), count

    def cut(self, x_BTX: Tensor, seen: Reach) -> Tensor:
        """(B, T, ...) -> (B, N, L, ...): the tokens of the block in each slot; in an empty slot,
        some tokens. `seen` is what tokens see of each other.
        """
        length = x_BTX.shape[1]
        slots = self.slots(length)
        if not slots:
            return x_BTX[:, :0, None].expand(-1, 0, self.size, *x_BTX.shape[2:])
        if seen.plain:
            return x_BTX.unfold(1, self.size, self.stride).movedim(-1, 2)
        first_BN = self._last_tokens(spots(seen, length, length, x_BTX.device)) - self.size + 1
        index_BNL = first_BN[..., None] + torch.arange(self.size, device=x_BTX.device)
        row = torch.arange(len(x_BTX), device=x_BTX.device)[:, None, None]
        flat = (row * length + index_BNL).flatten()
        picked = x_BTX.flatten(0, 1).index_select(0, flat)
        return picked.view(len(x_BTX), slots, self.size, *x_BTX.shape[2:])

    def _last_tokens(self, at: Spots) -> Tensor:
        """(B, N): the place in each slot's span of d places where a block ends; if none does, the
        first.
        """
        length = at.place_BT.shape[1]
        begin = torch.arange(self.slots(length), device=at.place_BT.device) * self.stride
        span_ND = begin[:, None] + self.size - 1 + torch.arange(self.stride, device=begin.device)
        ended_BND = self.ends(at)[:, span_ND.clamp(max=length - 1)] & (span_ND < length)
        return begin + self.size - 1 + ended_BND.int().argmax(-1)


class Ended(NamedTuple):
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
        blocks: Blocks,
        rows: int,
        capacity: int,
        shapes: list[tuple[int, ...]],
        pooled: list[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.blocks = blocks
        self.recent = Ring(rows, capacity, blocks.size, shapes, dtype, device)
        self.kept = Append(rows, blocks.slots(capacity), pooled, dtype, device)

    def take(self, segments_BT: Tensor | None, at: Spots, *new: Tensor) -> Ended:
        """Take in (B, T, ...) tensors; return the blocks to pool and `keep`."""
        held, seen = self.recent.append(segments_BT, *new)
        row, column = self.blocks.ends(at).expand(new[0].shape[:2]).nonzero(as_tuple=True)
        place_E = at.place_BT.expand(new[0].shape[:2])[row, column]
        back_L = torch.arange(self.blocks.size - 1, -1, -1, device=row.device)
        if seen.places_BS is not None:
            index_EL = (place_E[:, None] - back_L) % self.recent.slots
        elif seen.high_BT is not None:
            index_EL = seen.high_BT[row, column, None] - back_L
        else:
            index_EL = place_E[:, None] - back_L
        tokens = [tensor[row[:, None], index_EL] for tensor in held]
        return Ended(row, column, self.blocks.slot(place_E), tokens)

    def keep(self, ended: Ended, *pooled: Tensor) -> list[Tensor]:
        """Store what became of blocks that ended, (E, ...) each; return all, (B, N, ...) each."""
        for tensor, fresh in zip(self.kept.tensors, pooled, strict=True):
            tensor[ended.row_E, ended.slot_E] = fresh.to(tensor.dtype)
        used = self.blocks.slots(self.recent.rows.longest)
        return [tensor[:, :used] for tensor in self.kept.tensors]

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows."""
        self.recent.select(rows)
        self.kept.select(rows)

    def check_rewind(self, lengths: Tensor) -> None:
        """Raise where tokens of a block that has not ended yet would be missing."""
        rows, (size, stride) = self.recent.rows, self.blocks
        lengths = lengths.to(rows.lengths.device, torch.long)
        rows.check_rewind(lengths)
        ended = ((lengths - rows.starts - size) // stride + 1).clamp(min=0)
        needed = rows.starts + ended * stride
        dropped = (needed < rows.lengths - self.recent.slots) & (needed < lengths)
        if bool((dropped & (lengths < rows.lengths)).any()):
            raise CannotRewind(
                f"a block of {size} tokens has already dropped its first ones: "
                "take the row in again from its start"
            )

    def truncate(self, lengths: Tensor) -> None:
        """Forget the newest tokens, or raise and change nothing; a block that is no more is seen by
        nobody until its slot is written again.
        """
        self.check_rewind(lengths)
        self.recent.rows.truncate(lengths.to(self.recent.rows.lengths.device, torch.long))

    def join(self, other: "BlockCache") -> None:
        """Append the rows of `other`."""
        self.recent.join(other.recent)
        self.kept.join(other.kept)

    def nbytes(self) -> int:
        """Blocks and recent tokens."""
        return self.recent.nbytes() + self.kept.nbytes()


def attend_blocks(
    q_BTHD: Tensor,
    k_BNGD: Tensor,
    v_BNGD: Tensor,
    blocks: Blocks,
    at: Spots,
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
    first_BT, count_BT = blocks.seen(at)
    low = first_BT.clamp(max=slots - 1)
    some = Reach(low, (first_BT + count_BT - 1).maximum(low))
    y_BTHD = attend(q_BTHD, k_BNGD, v_BNGD, some, kind=kind, dropout=dropout)
    return y_BTHD.masked_fill((count_BT == 0)[..., None, None], 0)

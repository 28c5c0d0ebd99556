"""Recurrent state: the cache of mixers whose state has a fixed size, such as linear attention,
state-space models and RNNs, and its rules for packed documents and padding.

    h_t = a_t h_{t-1} + b_t

At the first token of a document, h_{t-1} is 0. Padding leaves the state unchanged: h_t = h_{t-1}.

Legend: B rows, T tokens of this call, X further dimensions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tinsmith.nn.attention.cache import RowState
from tinsmith.nn.attention.span import is_document_start
from tinsmith.nn.contract import CannotTruncate


class RecurrentSteps(NamedTuple):
    """Which tokens of a call reset the recurrent state, and which leave it unchanged.

    Both fields are None if no token of the call does either.
    """

    starts_BT: Tensor | None = None
    """True for the first token of a document, which resets the state to 0."""
    valid_BT: Tensor | None = None
    """False for padding, which leaves the state unchanged."""

    def mask(self, decay_BTX: Tensor, update_BTX: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b of h_t = a_t h_{t-1} + b_t: a is 0 at first tokens of documents, and a is
        1 and b is 0 at padding.
        """
        if self.starts_BT is None or self.valid_BT is None:
            return decay_BTX, update_BTX
        starts, padding = self.starts_BT, ~self.valid_BT
        decay_BTX = decay_BTX.masked_fill(_expand_as(starts, decay_BTX), 0)
        decay_BTX = decay_BTX.masked_fill(_expand_as(padding, decay_BTX), 1)
        return decay_BTX, update_BTX.masked_fill(_expand_as(padding, update_BTX), 0)


def recurrent_steps(segments_BT: Tensor | None) -> RecurrentSteps:
    """Return the steps of rows that begin with a state of 0: a forward pass without a cache."""
    if segments_BT is None:
        return RecurrentSteps()
    valid_BT = segments_BT >= 0
    return RecurrentSteps(is_document_start(segments_BT) & valid_BT, valid_BT)


class RecurrentCache:
    """Holds one or several state tensors (B, *shape) per row, whatever the number of tokens.

    A mixer calls `append`, computes the states after the last token, and passes them to `store`.
    States have the dtype of the cache; a mixer that needs more precision creates its cache in
    float32. The capacity limits tokens as in other caches, so that all layers accept the same rows.
    """

    def __init__(
        self,
        batch_size: int,
        capacity: int,
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.capacity = capacity
        self.states = [
            torch.zeros(batch_size, *shape, dtype=dtype, device=device) for shape in shapes
        ]
        self.row_state = RowState(batch_size, device)

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens appended per row."""
        return self.row_state.lengths

    def append(self, segments_BT: Tensor | None, count: int) -> tuple[list[Tensor], RecurrentSteps]:
        """Count `count` tokens per row; return the states before them, and their steps.

        Raise CacheFull, and change nothing, if a row would exceed the capacity.
        """
        positions = self.row_state.append_positions(count, segments_BT, self.capacity)
        if positions.valid_BT is None:
            return self.states, RecurrentSteps()
        starts_BT = (positions.cache_position_BT == positions.start_BT) & positions.valid_BT
        return self.states, RecurrentSteps(starts_BT, positions.valid_BT)

    def store(self, *states: Tensor) -> None:
        """Replace the states by those after the last token of the call."""
        self.states = [new.to(old.dtype) for old, new in zip(self.states, states, strict=True)]

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows."""
        self.states = [state[rows] for state in self.states]
        self.row_state.select(rows)

    def check_truncate(self, lengths: Tensor) -> None:
        """Raise CannotTruncate if any row would lose tokens: earlier states are not stored."""
        lengths = lengths.to(self.lengths.device, torch.long)
        self.row_state.check_truncate(lengths)
        if bool((lengths < self.lengths).any()):
            raise CannotTruncate(
                "a recurrent state cannot forget tokens: process the row again from its start"
            )

    def truncate(self, lengths: Tensor) -> None:
        """Keep all tokens, or raise as `check_truncate` does."""
        self.check_truncate(lengths)

    def join(self, other: "RecurrentCache") -> None:
        """Append the rows of `other`; the larger capacity is kept."""
        pairs = zip(self.states, other.states, strict=True)
        self.states = [torch.cat(pair) for pair in pairs]
        self.capacity = max(self.capacity, other.capacity)
        self.row_state.join(other.row_state)

    def nbytes(self) -> int:
        """Return the size of the states in bytes; it does not depend on the capacity."""
        return sum(state.numel() * state.element_size() for state in self.states)


def _expand_as(mask_BT: Tensor, x_BTX: Tensor) -> Tensor:
    """Return a mask (B, T, 1, ...) with as many dimensions as x."""
    return mask_BT.reshape(*mask_BT.shape, *[1] * (x_BTX.dim() - 2))

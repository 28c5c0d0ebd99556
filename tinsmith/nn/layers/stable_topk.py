"""Discrete choices that come out the same however a sum was made: the one home of the tie rule.

A choice orders by (score descending, index ascending). Scores are first rounded to a grid, because
a decoding step, a longer row and a padded batch add the same numbers in another order: sums that
are equal in exact arithmetic differ in their last bits, and would be chosen by chance. So scores
closer than a grid point are ties, those of a saturated sigmoid among them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

GRID = 2.0**20
"""Grid points per 1: far above rounding errors of float32 scores around 1."""
MAX_SCORE = 2.0**22
"""Scores beyond are ties: the order of 2^42 grid points times 2^21 candidates fits in an int64."""


@torch.library.custom_op("tinsmith::decided", mutates_args=())
def must_save(choice: Tensor) -> Tensor:
    """The choice, bool or int64. Activation checkpointing makes everything again but this: a
    rounding that comes out otherwise turns no expert.
    """
    return choice.clone()


@must_save.register_fake
def _(choice: Tensor) -> Tensor:
    return torch.empty_like(choice)


def must_save_context_fn() -> Any:
    """The `context_fn` of a checkpointed block whose parts decide."""
    return create_selective_checkpoint_contexts([torch.ops.tinsmith.decided.default])


def rank_keys(scores: Tensor) -> Tensor:
    """(..., S) scores, at least float32 -> int64 that rank as the scores do, ties by index; -inf
    ranks lowest. All differ, so any sorting gives the one right order. S is at most 2^21.
    """
    count = scores.shape[-1]
    steps = (
        scores.detach().nan_to_num(neginf=-MAX_SCORE).clamp(-MAX_SCORE, MAX_SCORE) * GRID
    ).round()
    index = torch.arange(count, device=scores.device)
    return steps.to(torch.int64) * count + (count - 1 - index)


def stable_topk(scores: Tensor, count: int) -> Tensor:
    """(..., S) -> (..., min(count, S)) int64: the indices of the best scores, best first; ties go
    to the smaller index. Whoever hides candidates with -inf checks what was chosen.
    """
    count = min(count, scores.shape[-1])
    return rank_keys(scores).topk(count, -1).indices

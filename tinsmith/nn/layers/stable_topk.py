"""Top-k selection that does not depend on the order of summation, with a fixed tie rule.

Candidates are ordered by (score descending, index ascending). Scores are first rounded to a grid,
because a decoding step, a longer row and a padded batch sum the same terms in another order: sums
that are equal in exact arithmetic differ in their last bits, and the selection would be random. So
scores closer than a grid step are ties, including those of a saturated sigmoid.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

GRID = 2.0**20
"""Grid points per unit; a grid step is far larger than float32 rounding errors of scores near 1."""
MAX_SCORE = 2.0**22
"""Scores beyond it are ties: 2^42 grid points times 2^21 candidates fit into an int64."""


@torch.library.custom_op("tinsmith::decided", mutates_args=())
def must_save(choice: Tensor) -> Tensor:
    """Mark a selection (bool or int64) that activation checkpointing saves instead of recomputing.

    So a different rounding in the recomputation cannot change the selected experts.
    """
    return choice.clone()


@must_save.register_fake
def _(choice: Tensor) -> Tensor:
    return torch.empty_like(choice)


def must_save_context_fn() -> Any:
    """Return the `context_fn` of a checkpointed block that contains selections."""
    return create_selective_checkpoint_contexts([torch.ops.tinsmith.decided.default])


def rank_keys(scores: Tensor) -> Tensor:
    """Map scores (..., S), at least float32, to int64 keys in the same order, ties by index.

    -inf ranks lowest. All keys differ, so any sort gives the same order. S is at most 2^21.
    """
    count = scores.shape[-1]
    steps = (
        scores.detach().nan_to_num(neginf=-MAX_SCORE).clamp(-MAX_SCORE, MAX_SCORE) * GRID
    ).round()
    index = torch.arange(count, device=scores.device)
    return steps.to(torch.int64) * count + (count - 1 - index)


def stable_topk(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the highest scores, (..., S) to (..., min(count, S)) int64, best first.

    Ties go to the smaller index. Callers that exclude candidates with -inf must check the result.
    """
    count = min(count, scores.shape[-1])
    return rank_keys(scores).topk(count, -1).indices

"""Linear gates: which experts a token chooses, and how much each of them counts.

    logits = W x      probabilities = softmax(logits), or sigmoid(logits) / its sum
    the K best by score + bias are chosen; w = score, or score / sum of the chosen scores

All of it in at least float32. A choice orders by (score descending, index ascending). Where K = 1 a
renormalised weight would be 1 whatever the gate says and the gate would never learn, so there the
raw score counts (the fault of MiniMind's and Tiny-R2's published routers).

Legend: N tokens, K choices of a token, E experts, D width.
"""

from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.nn.layers.stable_topk import stable_topk
from tinsmith.nn.precision import at_least_fp32, no_autocast


class RouterOutput(NamedTuple):
    """What a gate says."""

    logits_NE: Tensor
    probabilities_NE: Tensor
    """At least float32; they sum to 1 over the experts."""
    expert_indices_NK: Tensor
    """int64, best first, all different in a row."""
    weights_NK: Tensor


class RouterLinear(nn.Linear):
    """A linear gate without biases."""

    ROLE: ClassVar[Literal["router"]] = "router"

    def __init__(self, dim: int, num_experts: int):
        super().__init__(dim, num_experts, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) -> logits (..., E), at least float32."""
        return router_logits(input, self.weight)


def router_logits(input: Tensor, weight_ED: Tensor) -> Tensor:
    """(..., D) -> logits (..., E), at least float32, under autocast too."""
    kind = at_least_fp32(input.dtype)
    with no_autocast(input.device):
        return F.linear(input.to(kind), weight_ED.to(kind))


def combine_weights(scores_NE: Tensor, expert_indices_NK: Tensor, norm_topk_prob: bool) -> Tensor:
    """(N, K): the scores of what was chosen; with `renormalise` and K > 1 they sum to 1."""
    chosen_NK = scores_NE.gather(1, expert_indices_NK)
    if not norm_topk_prob or expert_indices_NK.shape[1] == 1:
        return chosen_NK
    return chosen_NK / (chosen_NK.sum(1, keepdim=True) + 1e-20)


def group_limited_scores(scores_NE: Tensor, n_group: int, topk_group: int) -> Tensor:
    """Scores with those of all but the `kept` best of `groups` equal groups of neighbours at -inf.
    A group is as good as its two best experts together (DeepSeek-V3, 2412.19437).
    """
    if topk_group == n_group:
        return scores_NE
    scores_NGS = scores_NE.unflatten(1, (n_group, -1))
    two_NG = scores_NGS.topk(min(2, scores_NGS.shape[2]), -1).values.sum(-1)
    open_NG = torch.zeros_like(two_NG, dtype=torch.bool).scatter(
        1, stable_topk(two_NG, topk_group), True
    )
    return scores_NGS.masked_fill(~open_NG[..., None], -torch.inf).flatten(1)


def entropy(probabilities_NE: Tensor) -> Tensor:
    """(N,) in nats."""
    return torch.special.entr(probabilities_NE).sum(-1)

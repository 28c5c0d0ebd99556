"""Linear routers: which experts a token selects, and the weights of their outputs.

    logits = W x      probabilities = softmax(logits), or sigmoid(logits) / its sum
    selected: the K best by score + bias
    w = score, or score / sum of the selected scores

All in at least float32. Selection is by (score descending, index ascending). With K = 1 a
renormalised weight would always be 1 and the router would have no gradient, so the weight is the
raw score (a fault in the published routers of MiniMind and Tiny-R2).

Legend: N tokens, K selected experts of a token, E experts, D width.
"""

from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.nn.layers.stable_topk import stable_topk
from tinsmith.nn.precision import at_least_fp32, no_autocast


class RouterOutput(NamedTuple):
    """The routing of N tokens by a linear router."""

    logits_NE: Tensor
    probabilities_NE: Tensor
    """At least float32; they sum to 1 over the experts."""
    expert_indices_NK: Tensor
    """int64, best first, all different in a row."""
    weights_NK: Tensor


class RouterLinear(nn.Linear):
    """A linear router without biases."""

    ROLE: ClassVar[Literal["router"]] = "router"

    def __init__(self, dim: int, num_experts: int):
        super().__init__(dim, num_experts, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., D) to logits (..., E) in at least float32."""
        return router_logits(input, self.weight)


def router_logits(input: Tensor, weight_ED: Tensor) -> Tensor:
    """Map (..., D) to logits (..., E) in at least float32, also under autocast."""
    dtype = at_least_fp32(input.dtype)
    with no_autocast(input.device):
        return F.linear(input.to(dtype), weight_ED.to(dtype))


def combine_weights(scores_NE: Tensor, expert_indices_NK: Tensor, norm_topk_prob: bool) -> Tensor:
    """Return the scores of the selected experts, (N, K); they sum to 1 if `norm_topk_prob` and K >
    1.
    """
    selected_NK = scores_NE.gather(1, expert_indices_NK)
    if not norm_topk_prob or expert_indices_NK.shape[1] == 1:
        return selected_NK
    return selected_NK / (selected_NK.sum(1, keepdim=True) + 1e-20)


def group_limited_scores(scores_NE: Tensor, n_group: int, topk_group: int) -> Tensor:
    """Set the scores of all experts outside of the `topk_group` best groups to -inf.

    The experts form `n_group` equal groups of neighbours. The score of a group is the sum of its
    two best experts (DeepSeek-V3, 2412.19437).
    """
    if topk_group == n_group:
        return scores_NE
    scores_NGS = scores_NE.unflatten(1, (n_group, -1))
    group_scores_NG = scores_NGS.topk(min(2, scores_NGS.shape[2]), -1).values.sum(-1)
    selected_NG = torch.zeros_like(group_scores_NG, dtype=torch.bool).scatter(
        1, stable_topk(group_scores_NG, topk_group), True
    )
    return scores_NGS.masked_fill(~selected_NG[..., None], -torch.inf).flatten(1)


def entropy(probabilities_NE: Tensor) -> Tensor:
    """Return the entropy of probabilities in nats, (N, E) to (N,)."""
    return torch.special.entr(probabilities_NE).sum(-1)

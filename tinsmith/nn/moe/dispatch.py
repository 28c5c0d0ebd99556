"""Which expert works on which token: pairs, sorted by expert.

    y_n = sum over the pairs (e, n) of  w_p f_e(x_n)

Every chosen pair is computed, and no other: no capacity, no token dropped. Gather the tokens of the
pairs, run each expert on its rows (`moe.grouped_gemm`), weigh, add to the tokens.

Legend: N tokens, K choices of a token, E experts, P pairs, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class DispatchPlan(NamedTuple):
    """Pairs of an expert and a token, by expert, then by token. Pairs past the last end belong to
    nobody: they are there where a shape must not depend on the data.
    """

    tokens_P: Tensor
    """int64: the token of each pair."""
    flat_indices_P: Tensor
    """int64: where in the flattened table of choices, (N, E) or (N, K), each pair stands."""
    ends_E: Tensor
    """int32: where the pairs of each expert end."""

    @property
    def load_E(self) -> Tensor:
        """(E,) int64: pairs of each expert."""
        return self.ends_E.long().diff(prepend=self.ends_E.new_zeros(1, dtype=torch.long))

    def gather(self, x_ND: Tensor) -> Tensor:
        """(P, D): the token of each pair."""
        return x_ND.index_select(0, self.tokens_P)

    def gather_weights(self, table: Tensor) -> Tensor:
        """(P,): a table of the shape that the plan was made from, (N, E) or (N, K), by pairs."""
        return table.flatten().index_select(0, self.flat_indices_P)


def plan_from_mask(mask_NE: Tensor) -> DispatchPlan:
    """The pairs that `mask` (N, E) bool allows; as many as there are. Where a shape must not depend
    on the data, as in a compiled graph, N E of them: the last belong to nobody.
    """
    if mask_NE.is_meta or torch.compiler.is_compiling():
        return _static(mask_NE)
    expert_P, token_P = mask_NE.mT.nonzero(as_tuple=True)
    ends_E = mask_NE.sum(0).cumsum(0).to(torch.int32)
    return DispatchPlan(token_P, token_P * mask_NE.shape[1] + expert_P, ends_E)


def _static(mask_NE: Tensor) -> DispatchPlan:
    tokens, experts = mask_NE.shape
    expert_E = torch.arange(experts, device=mask_NE.device)
    choices_NE = expert_E.expand(tokens, experts).where(mask_NE, experts)
    return _sorted(choices_NE, experts)


def plan_from_indices(
    expert_indices_NK: Tensor, num_experts: int, valid_N: Tensor | None = None
) -> DispatchPlan:
    """The pairs of tokens and the experts they chose: `choices` (N, K) int64, all different in a
    row. Always N K pairs: those of tokens that are not `valid` (N,) bool are sorted past the last
    end.
    """
    if valid_N is not None:
        expert_indices_NK = expert_indices_NK.where(valid_N[:, None], num_experts)
    return _sorted(expert_indices_NK, num_experts)


def _sorted(choices_NK: Tensor, experts: int) -> DispatchPlan:
    """`experts` itself stands for nobody."""
    expert_P, places_P = choices_NK.flatten().sort(stable=True)
    expert_E = torch.arange(experts, device=choices_NK.device)
    ends_E = torch.searchsorted(expert_P, expert_E, right=True, out_int32=True)
    return DispatchPlan(places_P // choices_NK.shape[1], places_P, ends_E)


def combine(y_PD: Tensor, weights_P: Tensor, plan: DispatchPlan, num_tokens: int) -> Tensor:
    """(N, D): for each of N `tokens` the weighted sum over its pairs, 0 for one without pairs."""
    weighted_PD = y_PD * weights_P[:, None].to(y_PD.dtype)
    sums_ND = y_PD.new_zeros(num_tokens, y_PD.shape[1])
    return sums_ND.index_add(0, plan.tokens_P, weighted_PD)

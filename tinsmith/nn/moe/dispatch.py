"""Dispatch tokens to experts as pairs sorted by expert, and combine the outputs.

    y_n = sum over the pairs (e, n) of  w_p f_e(x_n)

Every selected pair is computed, and no other: there is no capacity and no token is dropped. Gather
the tokens of the pairs, run each expert on its rows (`moe.grouped_gemm`), multiply by the weights,
add to the tokens.

Legend: N tokens, K selected experts of a token, E experts, P pairs, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class DispatchPlan(NamedTuple):
    """Pairs of an expert and a token, sorted by expert, then by token.

    Pairs past the last end belong to no expert; they exist where a shape must not depend on the
    data.
    """

    tokens_P: Tensor
    """int64: the token of each pair."""
    flat_indices_P: Tensor
    """int64: index of each pair in the flattened routing table, (N, E) or (N, K)."""
    ends_E: Tensor
    """int32: end of each expert's pairs."""

    @property
    def load_E(self) -> Tensor:
        """Number of pairs of each expert, (E,) int64."""
        return self.ends_E.long().diff(prepend=self.ends_E.new_zeros(1, dtype=torch.long))

    def gather(self, x_ND: Tensor) -> Tensor:
        """Return the token of each pair, (P, D)."""
        return x_ND.index_select(0, self.tokens_P)

    def gather_weights(self, table: Tensor) -> Tensor:
        """Return the elements of a routing table, (N, E) or (N, K), for each pair, (P,)."""
        return table.flatten().index_select(0, self.flat_indices_P)


def plan_from_mask(mask_NE: Tensor) -> DispatchPlan:
    """Return the plan of the pairs where `mask_NE` (bool) is True.

    If a shape must not depend on the data, as in a compiled graph, the plan has N E pairs, and
    those past the last end belong to no expert.
    """
    if mask_NE.is_meta or torch.compiler.is_compiling():
        return _plan_with_static_shape(mask_NE)
    expert_P, token_P = mask_NE.mT.nonzero(as_tuple=True)
    ends_E = mask_NE.sum(0).cumsum(0).to(torch.int32)
    return DispatchPlan(token_P, token_P * mask_NE.shape[1] + expert_P, ends_E)


def _plan_with_static_shape(mask_NE: Tensor) -> DispatchPlan:
    num_tokens, num_experts = mask_NE.shape
    expert_E = torch.arange(num_experts, device=mask_NE.device)
    indices_NE = expert_E.expand(num_tokens, num_experts).where(mask_NE, num_experts)
    return _plan_from_sort(indices_NE, num_experts)


def plan_from_indices(
    expert_indices_NK: Tensor, num_experts: int, valid_N: Tensor | None = None
) -> DispatchPlan:
    """Return the plan of expert indices (N, K) int64, all different within a row.

    It always has N K pairs; those of tokens that are not `valid_N` (bool) are sorted past the last
    end.
    """
    if valid_N is not None:
        expert_indices_NK = expert_indices_NK.where(valid_N[:, None], num_experts)
    return _plan_from_sort(expert_indices_NK, num_experts)


def _plan_from_sort(indices_NK: Tensor, num_experts: int) -> DispatchPlan:
    """Sort pairs by expert; the index `num_experts` stands for no expert."""
    expert_P, flat_indices_P = indices_NK.flatten().sort(stable=True)
    expert_E = torch.arange(num_experts, device=indices_NK.device)
    ends_E = torch.searchsorted(expert_P, expert_E, right=True, out_int32=True)
    return DispatchPlan(flat_indices_P // indices_NK.shape[1], flat_indices_P, ends_E)


def combine(y_PD: Tensor, weights_P: Tensor, plan: DispatchPlan, num_tokens: int) -> Tensor:
    """Return (N, D): the weighted sum over each token's pairs, 0 for a token without pairs."""
    weighted_PD = y_PD * weights_P[:, None].to(y_PD.dtype)
    sums_ND = y_PD.new_zeros(num_tokens, y_PD.shape[1])
    return sums_ND.index_add(0, plan.tokens_P, weighted_PD)

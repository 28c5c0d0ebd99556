"""What keeps experts busy: losses on the gate's probabilities, and the bias that needs no loss.

Over valid tokens, with f_e the pairs of expert e per token (they sum to K) and P_e its mean
probability, which is what carries the gradient:

    switch     E sum_e f_e P_e              K in balance; Switch Transformer (2101.03961) for K
                                            choices, as `load_balancing_loss_func` of transformers
    sequence   E / K sum_e f_e P_e          of every row by itself, then their mean; 1 in balance
                                            (DeepSeek-V2, 2405.04434)
    squared    E sum_e (P_e - 1 / E)^2      0 in balance (Tiny-R2)
    z          mean of (log sum_e exp logit_e)^2     keeps logits small (ST-MoE, 2202.08906)

Legend: B rows, T tokens of a row, N = B T, K choices of a token, E experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BalanceLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(probabilities (B, T, E), choices (B, T, K), valid (B, T) bool) -> a scalar."""


def switch_loss(probabilities_BTE: Tensor, expert_indices_BTK: Tensor, valid_BT: Tensor) -> Tensor:
    """All tokens together."""
    together = (x.flatten(0, 1)[None] for x in (probabilities_BTE, expert_indices_BTK, valid_BT))
    return _agreement(*together)[0]


def sequence_loss(
    probabilities_BTE: Tensor, expert_indices_BTK: Tensor, valid_BT: Tensor
) -> Tensor:
    """Each row by itself; rows without a token do not count."""
    agreement_B = (
        _agreement(probabilities_BTE, expert_indices_BTK, valid_BT) / expert_indices_BTK.shape[2]
    )
    return agreement_B.sum() / valid_BT.any(1).sum().clamp(min=1)


def squared_loss(probabilities_BTE: Tensor, expert_indices_BTK: Tensor, valid_BT: Tensor) -> Tensor:
    """All tokens together, their choices set aside."""
    experts = probabilities_BTE.shape[2]
    share_1E = _mean(probabilities_BTE.flatten(0, 1)[None], valid_BT.flatten()[None])
    # Without a single token there is nothing to balance.
    return experts * (share_1E - 1 / experts).square().sum() * valid_BT.any()


BALANCE_LOSSES: dict[str, BalanceLoss] = {
    "switch": switch_loss,
    "sequence": sequence_loss,
    "squared": squared_loss,
}


def z_loss(logits_BTE: Tensor, valid_BT: Tensor) -> Tensor:
    """The mean over tokens of the square of the logits' log-sum-exp."""
    return _mean(logits_BTE.logsumexp(-1).square().flatten()[None, :, None], valid_BT.view(1, -1))[
        0, 0
    ]


def update_bias(bias_E: Tensor, load_E: Tensor, update_speed: float) -> None:
    """b_e += rate sign(mean load - load_e), in place: who has too much gets less (Wang et al.,
    2408.15664).
    """
    load_E = load_E.to(bias_E)
    bias_E.add_((load_E.mean() - load_E).sign(), alpha=update_speed)


def _agreement(probabilities_BTE: Tensor, choices_BTK: Tensor, valid_BT: Tensor) -> Tensor:
    """(B,): E sum_e f_e P_e of every row, 0 for one without tokens."""
    share_BE = _mean(probabilities_BTE, valid_BT)
    ones_BTK = valid_BT[..., None].expand_as(choices_BTK).to(share_BE.dtype)
    count_BE = torch.zeros_like(share_BE).scatter_add(
        1, choices_BTK.flatten(1), ones_BTK.flatten(1)
    )
    load_BE = count_BE / valid_BT.sum(1, keepdim=True).clamp(min=1)
    return share_BE.shape[1] * (load_BE * share_BE).sum(1)


def _mean(values_BTE: Tensor, valid_BT: Tensor) -> Tensor:
    """(B, E): the mean over valid tokens, 0 where there are none."""
    kept_BTE = values_BTE.masked_fill(~valid_BT[..., None], 0)
    return kept_BTE.sum(1) / valid_BT.sum(1, keepdim=True).clamp(min=1)

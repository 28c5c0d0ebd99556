"""Load balancing of experts: losses on router probabilities, and the loss-free routing bias.

Over valid tokens, with f_e the pairs of expert e per token (they sum to K) and P_e its mean
probability, which carries the gradient:

    switch     E sum_e f_e P_e              K if balanced; Switch Transformer (2101.03961) for K
                                            experts per token, as `load_balancing_loss_func` of
                                            transformers
    sequence   E / K sum_e f_e P_e          of every row separately, then their mean; 1 if balanced
                                            (DeepSeek-V2, 2405.04434)
    squared    E sum_e (P_e - 1 / E)^2      0 if balanced (Tiny-R2)
    z          mean of (log sum_e exp logit_e)^2     keeps logits small (ST-MoE, 2202.08906)

Legend: B rows, T tokens of a row, N = B T, K selected experts of a token, E experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BalanceLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(probabilities (B, T, E), expert indices (B, T, K), valid (B, T) bool) -> scalar loss."""


def switch_loss(probabilities_BTE: Tensor, expert_indices_BTK: Tensor, valid_BT: Tensor) -> Tensor:
    """Return the balance loss over all tokens of the micro-batch."""
    merged = (x.flatten(0, 1)[None] for x in (probabilities_BTE, expert_indices_BTK, valid_BT))
    return _balance(*merged)[0]


def sequence_loss(
    probabilities_BTE: Tensor, expert_indices_BTK: Tensor, valid_BT: Tensor
) -> Tensor:
    """Return the mean over rows of the balance loss of each row; empty rows do not count."""
    loss_B = _balance(probabilities_BTE, expert_indices_BTK, valid_BT) / expert_indices_BTK.shape[2]
    return loss_B.sum() / valid_BT.any(1).sum().clamp(min=1)


def squared_loss(probabilities_BTE: Tensor, expert_indices_BTK: Tensor, valid_BT: Tensor) -> Tensor:
    """Return the squared deviation of mean probabilities from 1 / E; indices are ignored."""
    experts = probabilities_BTE.shape[2]
    mean_1E = _mean(probabilities_BTE.flatten(0, 1)[None], valid_BT.flatten()[None])
    # without valid tokens the loss is 0
    return experts * (mean_1E - 1 / experts).square().sum() * valid_BT.any()


BALANCE_LOSSES: dict[str, BalanceLoss] = {
    "switch": switch_loss,
    "sequence": sequence_loss,
    "squared": squared_loss,
}


def z_loss(logits_BTE: Tensor, valid_BT: Tensor) -> Tensor:
    """Return the mean over tokens of the squared log-sum-exp of the logits."""
    return _mean(logits_BTE.logsumexp(-1).square().flatten()[None, :, None], valid_BT.view(1, -1))[
        0, 0
    ]


def update_bias(bias_E: Tensor, load_E: Tensor, update_speed: float) -> None:
    """b_e += update_speed sign(mean load - load_e), in place (Wang et al., 2408.15664).

    The bias of an overloaded expert decreases.
    """
    load_E = load_E.to(bias_E)
    bias_E.add_((load_E.mean() - load_E).sign(), alpha=update_speed)


def _balance(probabilities_BTE: Tensor, indices_BTK: Tensor, valid_BT: Tensor) -> Tensor:
    """Return E sum_e f_e P_e of every row, (B,); 0 for rows without valid tokens."""
    mean_BE = _mean(probabilities_BTE, valid_BT)
    ones_BTK = valid_BT[..., None].expand_as(indices_BTK).to(mean_BE.dtype)
    count_BE = torch.zeros_like(mean_BE).scatter_add(1, indices_BTK.flatten(1), ones_BTK.flatten(1))
    load_BE = count_BE / valid_BT.sum(1, keepdim=True).clamp(min=1)
    return mean_BE.shape[1] * (load_BE * mean_BE).sum(1)


def _mean(values_BTE: Tensor, valid_BT: Tensor) -> Tensor:
    """Return the mean over valid tokens, (B, E); 0 without valid tokens."""
    valid_BTE = values_BTE.masked_fill(~valid_BT[..., None], 0)
    return valid_BTE.sum(1) / valid_BT.sum(1, keepdim=True).clamp(min=1)

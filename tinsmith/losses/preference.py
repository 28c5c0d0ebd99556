"""Preference losses: DPO, IPO, SimPO, ORPO, KTO and Bradley-Terry.

Inputs are one number per pair, (B,). All but the last return three tensors (B,): the loss, and the
rewards of the chosen and of the rejected completion, detached. Log-probabilities are sums over a
completion's tokens, end of turn included, in nats; arguments named `mean_*` are means.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LossAndRewards = tuple[Tensor, Tensor, Tensor]
"""loss, chosen_reward, rejected_reward, each (B,)."""


def ipo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
) -> LossAndRewards:
    """(h - 1 / (2 beta))^2, with h the difference of the summed log-ratios of the two sides.

    Azar et al., 2310.12036, equation 17, whose tau is `beta`: the paper's h is made of sums, while
    some implementations average over tokens.
    """
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    loss = (chosen - rejected - 1 / (2 * beta)).square()
    return loss, beta * chosen.detach(), beta * rejected.detach()


def simpo_loss(
    mean_chosen: Tensor, mean_rejected: Tensor, beta: float, gamma: float = 0.5
) -> LossAndRewards:
    """-log sigmoid(beta (mean_chosen - mean_rejected) - gamma), without a reference.

    Means are log-probabilities per token. Meng et al., 2405.14734, equation 6.
    """
    loss = -logsigmoid(beta * (mean_chosen - mean_rejected) - gamma)
    return loss, beta * mean_chosen.detach(), beta * mean_rejected.detach()


def orpo_loss(mean_chosen: Tensor, mean_rejected: Tensor, beta: float) -> LossAndRewards:
    """-mean_chosen - beta log sigmoid(log-odds of chosen - of rejected), without a reference.

    Means are log-probabilities per token, odds = p / (1 - p) of p = exp(mean). Hong et al.,
    2403.07691, equations 6 and 7, whose lambda is `beta`.
    """
    loss = -mean_chosen - beta * logsigmoid(_log_odds(mean_chosen) - _log_odds(mean_rejected))
    return loss, beta * mean_chosen.detach(), beta * mean_rejected.detach()


def kto_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    drift: Tensor | float,
) -> LossAndRewards:
    """2 - sigmoid(chosen_reward - beta drift) - sigmoid(beta drift - rejected_reward).

    `drift`, not below 0, is the reference point z_0: the divergence of the policy from the
    reference, in nats per completion; it has no gradient. Ethayarajh et al., 2402.01306, equation
    8, for a desirable and an undesirable completion of equal weight.
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    loss = 2 - torch.sigmoid(chosen - beta * drift) - torch.sigmoid(beta * drift - rejected)
    return loss, chosen.detach(), rejected.detach()


def _log_odds(mean: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of p = exp(mean); finite where p rounds to 1."""
    mean = mean.clamp(max=-torch.finfo(mean.dtype).eps)
    return mean - torch.log(-torch.expm1(mean))


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> LossAndRewards:
    """-log sigmoid(margin) of every pair (B,), chosen_reward and rejected_reward; rewards are
    detached.

    Log-probabilities (B,) are sums over a completion's tokens, in nats; margin = chosen_reward -
    rejected_reward, reward = beta (policy - reference). 2305.18290, equation 7. With
    `label_smoothing` e, (1 - e) times that plus e times the loss of the sides exchanged (Mitchell,
    "A note on DPO with noisy preferences", 2023).
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    margin = chosen - rejected
    loss = -logsigmoid(margin)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * logsigmoid(-margin)
    return loss, chosen.detach(), rejected.detach()


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, center: float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected) + center (chosen + rejected)^2, of scores (B,), (B,)."""
    return -logsigmoid(chosen - rejected) + center * (chosen + rejected).square()

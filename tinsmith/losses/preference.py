"""Losses of a preference beside DPO's: tensors in, tensors out.

All take one number per pair, (B,), and return three of shape (B,): the loss, and the rewards of the
chosen and of the rejected answer, detached. Log-probabilities are sums over an answer's tokens, end
of turn included, in nats; averages where a name says so.
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
    """(h - 1 / (2 beta))^2, h the difference of the summed log-ratios of the two sides.

    Azar et al., 2310.12036, equation 17, whose tau is `beta`: the paper's h is made of sums, where
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

    `drift`, not below 0, is the reference point z_0: how far the policy is from the reference, in
    nats of a whole answer; it has no gradient. Ethayarajh et al., 2402.01306, equation 8, of a
    desirable and an undesirable answer of equal weight.
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    loss = 2 - torch.sigmoid(chosen - beta * drift) - torch.sigmoid(beta * drift - rejected)
    return loss, chosen.detach(), rejected.detach()


def _log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean); finite where p rounds to 1."""
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
    """Per pair (B,): -log sigmoid(margin), chosen_reward, rejected_reward; rewards are detached.

    Log-probabilities (B,) are sums over an answer's tokens, in nats; margin = chosen_reward -
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

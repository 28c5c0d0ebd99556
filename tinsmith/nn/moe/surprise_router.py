"""Train routers by surprise: SMK and SML.

The candidates C_t of a token are the experts that processed it, if there are at least two. With
logits r = u / 0.1 recomputed from a detached input,

    smk   mean_t CE(q_t, softmax_C r)    q hard: the least S; soft: softmax(-S / (0.2 mean_C S))
    sml   mean_t sum_C pi_te S_te / mean_C S    pi = softmax_C r, S held constant

so a router prefers the expert that the token would change least. S is compared only within a token,
so the scale of the loss has no effect. `sml_local` also trains the experts by the second formula: S
as a function of their weights, with the output gradient g held constant (first order; the exact
second order is global, and no layer knows it).

Degenerate solution: an expert whose output is near zero has no surprise and would win every token.
The guard removes candidates whose |y| is at most a tenth of the usual |y| of the layer; the
fraction of tokens that such an expert would have won, and the correlation of S with |y|, are always
reported. The usual |y| is the median weighted by |y| itself: pairs of at least that norm have half
of the total norm. The plain median would be 0 if half of the pairs had no output.

Experts that were re-initialised at the end of the last window are no candidates, because they have
no output yet.

Legend: N tokens, E experts, P pairs of them, D width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tinsmith.core.parse import Config, Size
from tinsmith.distributed.dtensor import accumulate_grad, full_tensor
from tinsmith.nn.layers.linear import ExpertWeight
from tinsmith.nn.layers.stable_topk import stable_topk
from tinsmith.nn.moe.cosine_router import CosineRouter, margins
from tinsmith.nn.moe.experts import Experts
from tinsmith.nn.moe.surprise import (
    CollectedProbes,
    ExpertMatrices,
    closed_form_surprise,
    collect_probes,
)
from tinsmith.nn.precision import at_least_fp32

TEMPERATURE = 0.1
"""Temperature of logits: cosines alone are too close together to separate thirty experts."""
SOFT_TARGET_TEMPERATURE = 0.2
INACTIVE_RATIO = 1e-3
"""An expert with at most this fraction of the usual |y| counts as inactive."""
GUARD_RATIO = 0.1
"""The guard removes candidates with at most this fraction of the usual |y|."""


@dataclass(frozen=True, kw_only=True)
class SurpriseRouterConfig(Config):
    """Recipe keys of the router's own loss. `router_grad: both` is task and smk."""

    router_grad: Literal["task", "smk", "sml", "both"] = "task"
    router_weight: float = 1.0
    smk_target: Literal["hard", "soft"] = "hard"
    candidates: Literal["active", "active+r", "all"] = "active"
    extra_candidates: Size = 1  # r, drawn for each token
    inactive_expert_guard: bool = True
    sml_local: bool = False

    def check_surprise_router(self) -> None:
        """Raise ValueError if keys contradict each other."""
        if self.router_weight < 0:
            raise ValueError(f"router_weight={self.router_weight} must be at least 0")
        if self.extra_candidates < 1:
            raise ValueError(f"extra_candidates={self.extra_candidates} must be at least 1")
        if self.sml_local and self.router_grad != "sml":
            raise ValueError("sml_local=true needs router_grad=sml")
        if self.smk_target == "soft" and self.router_grad not in ("smk", "both"):
            raise ValueError("smk_target=soft needs router_grad=smk or both")
        if self.candidates != "active" and not self.uses_surprise:
            raise ValueError(f"candidates={self.candidates} needs router_grad=smk, sml or both")

    @property
    def uses_task_gradient(self) -> bool:
        """Whether the router is trained by the task loss."""
        return self.router_grad in ("task", "both")

    @property
    def uses_surprise(self) -> bool:
        """Whether the router is trained by surprise."""
        return self.router_grad != "task"

    @property
    def needs_output_grad(self) -> bool:
        """Whether the output gradient g itself is needed, not only norms."""
        return self.sml_local or self.candidates != "active"


def add_router_gradients(
    config: SurpriseRouterConfig,
    gate: CosineRouter,
    experts: Experts,
    grad_probes: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Add the gradient of the router's surprise loss to that of prototypes and thresholds.

    With `sml_local`, also to that of the experts. Returns statistics as sums over tokens.
    """
    probes = collect_probes(grad_probes)
    if probes is None:
        return {}
    eligible_E = ~gate.window.newborn
    surprise_NE, norm_NE, candidates_NE = _candidates(config, experts, probes, eligible_E)
    usual_norm = weighted_median(norm_NE[candidates_NE])
    stats = _router_stats(surprise_NE, norm_NE, candidates_NE, usual_norm, probes.grad_norm_N)
    if config.inactive_expert_guard:
        candidates_NE = candidates_NE & (norm_NE > GUARD_RATIO * usual_norm)
    candidates_NE = candidates_NE & (candidates_NE.sum(-1, keepdim=True) > 1)
    prototypes, thresholds = (
        full_tensor(parameter).detach().requires_grad_()
        for parameter in (gate.prototypes, gate.thresholds)
    )
    with torch.enable_grad():
        logits_NE = margins(probes.x_ND, prototypes, thresholds) / TEMPERATURE
        if config.router_grad == "sml":
            loss = sml(logits_NE, surprise_NE, candidates_NE)
        else:
            loss = smk(logits_NE, surprise_NE, candidates_NE, soft=config.smk_target == "soft")
        scaled_loss = loss * probes.loss_scale * config.router_weight
    gradients = torch.autograd.grad(scaled_loss, (prototypes, thresholds))
    for parameter, gradient in zip((gate.prototypes, gate.thresholds), gradients, strict=True):
        accumulate_grad(parameter, gradient)
    if config.sml_local:
        _add_expert_gradients(config, experts, probes, logits_NE.detach(), candidates_NE)
    num_tokens = candidates_NE.any(-1).sum()
    return stats | {"router_loss": loss.detach() * num_tokens, "router_tokens": num_tokens}


def smk(
    logits_NE: Tensor, surprise_NE: Tensor, candidates_NE: Tensor, soft: bool = False
) -> Tensor:
    """Return the mean over tokens with candidates of CE(target, softmax of their logits)."""
    relative_NE = _relative_surprise(surprise_NE, candidates_NE)
    if soft:
        target_NE = _softmax(-relative_NE / SOFT_TARGET_TEMPERATURE, candidates_NE)
    else:
        least = stable_topk((-relative_NE).masked_fill(~candidates_NE, -torch.inf), 1)
        target_NE = torch.zeros_like(logits_NE).scatter(-1, least, 1.0)
    logprobs_NE = logits_NE.masked_fill(~candidates_NE, -torch.inf).log_softmax(-1)
    return _mean(-target_NE * logprobs_NE.where(candidates_NE, 0), candidates_NE)


def sml(logits_NE: Tensor, surprise_NE: Tensor, candidates_NE: Tensor) -> Tensor:
    """Return the mean over tokens with candidates of the expected relative surprise; 1 if all are
    equal.
    """
    relative_NE = _relative_surprise(surprise_NE, candidates_NE)
    return _mean(_softmax(logits_NE, candidates_NE) * relative_NE, candidates_NE)


def weighted_median(size_P: Tensor) -> Tensor:
    """Return the norm below which half of the sum of norms lies, (); 0 without pairs."""
    if not len(size_P):
        return size_P.new_zeros(())
    sorted_P = size_P.sort().values
    cumulative_P = sorted_P.cumsum(0)
    return sorted_P[torch.searchsorted(cumulative_P, cumulative_P[-1] / 2)]


def _relative_surprise(surprise_NE: Tensor, candidates_NE: Tensor) -> Tensor:
    """Return S divided by its mean among the candidates; 0 if all of them are 0."""
    surprise_masked_NE = surprise_NE.where(candidates_NE, 0)
    mean_N1 = surprise_masked_NE.sum(-1, keepdim=True) / candidates_NE.sum(-1, keepdim=True).clamp(
        min=1
    )
    return surprise_masked_NE / mean_N1.where(mean_N1 > 0, 1)


def _softmax(logits_NE: Tensor, candidates_NE: Tensor) -> Tensor:
    """Return the softmax over candidates; 0 elsewhere and for tokens without candidates."""
    lowest = torch.finfo(logits_NE.dtype).min
    return logits_NE.masked_fill(~candidates_NE, lowest).softmax(-1).where(candidates_NE, 0)


def _mean(loss_NE: Tensor, candidates_NE: Tensor) -> Tensor:
    """Return the mean over tokens with candidates; 0 without any. `loss_NE` is 0 elsewhere."""
    return loss_NE.sum() / candidates_NE.any(-1).sum().clamp(min=1)


@torch.no_grad()
def _candidates(
    config: SurpriseRouterConfig, experts: Experts, probes: CollectedProbes, eligible_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return S, |y| and the candidates, (N, E) each; S and |y| are 0 for other experts.

    `eligible_E` is False for experts that were just re-initialised.
    """
    active_NE = probes.active_NE
    if config.candidates == "active" or probes.output_grad_ND is None:
        candidates_NE = active_NE & eligible_E
        return (
            probes.surprise_NE * candidates_NE,
            probes.output_norm_NE * candidates_NE,
            candidates_NE,
        )
    routed_N1 = active_NE.any(-1, keepdim=True)
    candidates_NE = routed_N1 & eligible_E
    if config.candidates == "active+r":
        random_NE = torch.rand_like(probes.surprise_NE).masked_fill(active_NE | ~eligible_E, -1)
        count = min(config.extra_candidates, random_NE.shape[1])
        extra_NE = torch.zeros_like(active_NE).scatter(-1, random_NE.topk(count, -1).indices, True)
        candidates_NE = (active_NE | extra_NE) & candidates_NE
    scores = closed_form_surprise(
        _expert_matrices(experts), probes.x_ND, probes.output_grad_ND, candidates_NE
    )
    return *scores, candidates_NE


def _expert_matrices(experts: Experts) -> ExpertMatrices:
    """Return the detached weights of all experts in at least float32."""

    def detached(stack: ExpertWeight) -> Tensor:
        weight = full_tensor(stack.weight).detach()
        return weight.to(at_least_fp32(weight.dtype))

    gate = None if experts.gate_proj is None else detached(experts.gate_proj)
    return ExpertMatrices(gate, detached(experts.up_proj), detached(experts.down_proj))


def _add_expert_gradients(
    config: SurpriseRouterConfig,
    experts: Experts,
    probes: CollectedProbes,
    logits_NE: Tensor,
    candidates_NE: Tensor,
) -> None:
    """Add the gradient of sml with respect to the experts' weights; all else is held constant."""
    assert probes.output_grad_ND is not None
    weights = _expert_matrices(experts)
    trainable = [weight.requires_grad_() for weight in weights if weight is not None]
    with torch.enable_grad():
        surprise_NE, _ = closed_form_surprise(
            weights, probes.x_ND, probes.output_grad_ND, candidates_NE
        )
        mean_N1 = surprise_NE.detach().sum(-1, keepdim=True) / candidates_NE.sum(-1, keepdim=True)
        weight_NE = _softmax(logits_NE, candidates_NE) / mean_N1.where(mean_N1 > 0, 1)
        loss = (
            _mean(weight_NE * surprise_NE, candidates_NE) * probes.loss_scale * config.router_weight
        )
    stacks = (experts.gate_proj, experts.up_proj, experts.down_proj)
    parameters = [stack.weight for stack in stacks if stack is not None]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, trainable), strict=True):
        accumulate_grad(parameter, gradient)


@torch.no_grad()
def _router_stats(
    surprise_NE: Tensor,
    norm_NE: Tensor,
    candidates_NE: Tensor,
    usual_norm: Tensor,
    grad_norm_N: Tensor,
) -> dict[str, Tensor]:
    """Return statistics of the router.

    "surprise": S / |g|, summed over "pairs". "inactive_fraction": the number of tokens, among
    "compared" tokens with at least two candidates, whose candidate of least surprise has an output
    near zero relative to `usual_norm`. "surprise_norm_corr": corr(S, |y|) times "compared".
    """
    pairs = candidates_NE.sum()
    relative_NE = surprise_NE / grad_norm_N.where(grad_norm_N > 0, torch.inf)[:, None]
    compared_N = candidates_NE.sum(-1) > 1
    least_N1 = surprise_NE.masked_fill(~candidates_NE, torch.inf).argmin(-1, keepdim=True)
    inactive_N = norm_NE.gather(-1, least_N1)[:, 0] <= INACTIVE_RATIO * usual_norm
    centred = [x_NE - x_NE.sum() / pairs.clamp(min=1) for x_NE in (surprise_NE, norm_NE)]
    surprise, norm = (x_NE * candidates_NE for x_NE in centred)
    norm_product = surprise.norm() * norm.norm()
    correlation = (surprise * norm).sum() / norm_product.where(norm_product > 0, 1)
    return {
        "surprise": relative_NE.sum(),
        "pairs": pairs,
        "inactive_fraction": (inactive_N & compared_N).sum(),
        "surprise_norm_corr": correlation * compared_N.sum(),
        "compared": compared_N.sum(),
    }

"""Routers that learn from surprise: SMK and SML.

Among the candidates C_t of a token (the experts that worked on it, if there are two), and with
logits r = u / 0.1 made again from a detached input,

    smk   mean_t CE(q_t, softmax_C r)    q hard: the least S; soft: softmax(-S / (0.2 mean_C S))
    sml   mean_t sum_C pi_te S_te / mean_C S    pi = softmax_C r, S held fixed

so a router prefers the expert that the token would change least. S is compared within a token only;
the scale of the loss has no say. `sml_local` also lets the experts follow the second formula: S as
a function of their weights, with the gradient g from above held fixed (first order; the true
second order is global, no layer knows it).

Dark room: an expert that says nothing has no surprise and would win every token. The guard drops
candidates whose |y| is no more than a tenth of what is usual in the layer; the share of tokens that
such an expert would have won, and the correlation of S with |y|, are always reported. Usual is the
median weighted by |y| itself: half of all that is said is said in pairs of at least that size. The
plain median would be nothing where half of the pairs are silent.

Experts that the last window has born are no candidates: they have had no time to say anything.

Legend: N tokens, E experts, P pairs of them, D width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tinsmith.core.parse import Config, Size
from tinsmith.distributed.dtensor import accumulate_grad, full_tensor
from tinsmith.nn.layers.stable_topk import stable_topk
from tinsmith.nn.moe.cosine_router import CosineRouter, margins
from tinsmith.nn.moe.experts import Experts, ExpertWeight
from tinsmith.nn.moe.surprise import (
    CollectedProbes,
    ExpertMatrices,
    closed_form_surprise,
    collect_probes,
)
from tinsmith.nn.precision import at_least_fp32

TEMPERATURE = 0.1
"""Of logits: cosines alone are too close to each other to tell one expert from thirty."""
SOFT_TARGET_TEMPERATURE = 0.2
INACTIVE_RATIO = 1e-3
"""Up to this part of the usual |y| an expert says nothing."""
GUARD_RATIO = 0.1
"""Up to this part the guard drops a candidate."""


@dataclass(frozen=True, kw_only=True)
class SurpriseRouterConfig(Config):
    """The keys of a router's own loss. `both` is task and smk."""

    router_grad: Literal["task", "smk", "sml", "both"] = "task"
    router_weight: float = 1.0
    smk_target: Literal["hard", "soft"] = "hard"
    candidates: Literal["active", "active+r", "all"] = "active"
    extra_candidates: Size = 1  # r, drawn for each token
    inactive_expert_guard: bool = True
    sml_local: bool = False

    def check_surprise_router(self) -> None:
        """ValueError where keys contradict each other."""
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
        """The gate learns from the losses behind it."""
        return self.router_grad in ("task", "both")

    @property
    def uses_surprise(self) -> bool:
        """The gate learns from surprise."""
        return self.router_grad != "task"

    @property
    def needs_output_grad(self) -> bool:
        """g itself is needed, not only norms."""
        return self.sml_local or self.candidates != "active"


def add_router_gradients(
    config: SurpriseRouterConfig,
    gate: CosineRouter,
    experts: Experts,
    grad_probes: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Add the gradient of the router's own loss to that of prototypes and thresholds (and, with
    `sml_local`, of the experts); what there is to report, as sums over tokens.
    """
    found = collect_probes(grad_probes)
    if found is None:
        return {}
    old_E = ~gate.window.newborn
    surprise_NE, size_NE, known_NE = _candidates(config, experts, found, old_E)
    usual = weighted_median(size_NE[known_NE])
    stats = _report(surprise_NE, size_NE, known_NE, usual, found.grad_norm_N)
    if config.inactive_expert_guard:
        known_NE = known_NE & (size_NE > GUARD_RATIO * usual)
    known_NE = known_NE & (known_NE.sum(-1, keepdim=True) > 1)
    prototypes, thresholds = (
        full_tensor(parameter).detach().requires_grad_()
        for parameter in (gate.prototypes, gate.thresholds)
    )
    with torch.enable_grad():
        logits_NE = margins(found.x_ND, prototypes, thresholds) / TEMPERATURE
        if config.router_grad == "sml":
            lost = sml(logits_NE, surprise_NE, known_NE)
        else:
            lost = smk(logits_NE, surprise_NE, known_NE, soft=config.smk_target == "soft")
        scaled = lost * found.loss_scale * config.router_weight
    gradients = torch.autograd.grad(scaled, (prototypes, thresholds))
    for parameter, gradient in zip((gate.prototypes, gate.thresholds), gradients, strict=True):
        accumulate_grad(parameter, gradient)
    if config.sml_local:
        _learn_locally(config, experts, found, logits_NE.detach(), known_NE)
    scored = known_NE.any(-1).sum()
    return stats | {"router_loss": lost.detach() * scored, "router_tokens": scored}


def smk(
    logits_NE: Tensor, surprise_NE: Tensor, candidates_NE: Tensor, soft: bool = False
) -> Tensor:
    """The mean over tokens with candidates of CE(target, softmax of their logits)."""
    relative_NE = _relative(surprise_NE, candidates_NE)
    if soft:
        target_NE = _softmax(-relative_NE / SOFT_TARGET_TEMPERATURE, candidates_NE)
    else:
        least = stable_topk((-relative_NE).masked_fill(~candidates_NE, -torch.inf), 1)
        target_NE = torch.zeros_like(logits_NE).scatter(-1, least, 1.0)
    output_NE = logits_NE.masked_fill(~candidates_NE, -torch.inf).log_softmax(-1)
    return _mean(-target_NE * output_NE.where(candidates_NE, 0), candidates_NE)


def sml(logits_NE: Tensor, surprise_NE: Tensor, candidates_NE: Tensor) -> Tensor:
    """The mean over tokens with candidates of the surprise to be expected, 1 if none is better."""
    relative_NE = _relative(surprise_NE, candidates_NE)
    return _mean(_softmax(logits_NE, candidates_NE) * relative_NE, candidates_NE)


def weighted_median(size_P: Tensor) -> Tensor:
    """() the size at which half of the sum is reached from below; 0 without any."""
    if not len(size_P):
        return size_P.new_zeros(())
    sorted_P = size_P.sort().values
    below_P = sorted_P.cumsum(0)
    return sorted_P[torch.searchsorted(below_P, below_P[-1] / 2)]


def _relative(surprise_NE: Tensor, known_NE: Tensor) -> Tensor:
    """S over its mean among the candidates; 0 where all of them are 0."""
    kept_NE = surprise_NE.where(known_NE, 0)
    mean_N1 = kept_NE.sum(-1, keepdim=True) / known_NE.sum(-1, keepdim=True).clamp(min=1)
    return kept_NE / mean_N1.where(mean_N1 > 0, 1)


def _softmax(logits_NE: Tensor, known_NE: Tensor) -> Tensor:
    """Among candidates; 0 elsewhere, and for a token without any."""
    lowest = torch.finfo(logits_NE.dtype).min
    return logits_NE.masked_fill(~known_NE, lowest).softmax(-1).where(known_NE, 0)


def _mean(lost_NE: Tensor, known_NE: Tensor) -> Tensor:
    """Over tokens that have candidates; 0 without any. `lost` is 0 where not known."""
    return lost_NE.sum() / known_NE.any(-1).sum().clamp(min=1)


@torch.no_grad()
def _candidates(
    config: SurpriseRouterConfig, experts: Experts, found: CollectedProbes, old_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """S, |y|, 0 where not known, and whom they are known of among the old: (N, E) each."""
    active_NE = found.active_NE
    if config.candidates == "active" or found.output_grad_ND is None:
        known_NE = active_NE & old_E
        return found.surprise_NE * known_NE, found.output_norm_NE * known_NE, known_NE
    routed_N1 = active_NE.any(-1, keepdim=True)
    known_NE = routed_N1 & old_E
    if config.candidates == "active+r":
        drawn_NE = torch.rand_like(found.surprise_NE).masked_fill(active_NE | ~old_E, -1)
        count = min(config.extra_candidates, drawn_NE.shape[1])
        extra_NE = torch.zeros_like(active_NE).scatter(-1, drawn_NE.topk(count, -1).indices, True)
        known_NE = (active_NE | extra_NE) & known_NE
    output = closed_form_surprise(_weights(experts), found.x_ND, found.output_grad_ND, known_NE)
    return *output, known_NE


def _weights(experts: Experts) -> ExpertMatrices:
    """Detached, at least float32."""

    def wanted(stack: ExpertWeight) -> Tensor:
        weight = full_tensor(stack.weight).detach()
        return weight.to(at_least_fp32(weight.dtype))

    gate = None if experts.gate_proj is None else wanted(experts.gate_proj)
    return ExpertMatrices(gate, wanted(experts.up_proj), wanted(experts.down_proj))


def _learn_locally(
    config: SurpriseRouterConfig,
    experts: Experts,
    found: CollectedProbes,
    logits_NE: Tensor,
    known_NE: Tensor,
) -> None:
    """The experts' gradient of sml's formula: S of their weights, all else held fixed."""
    assert found.output_grad_ND is not None
    weights = _weights(experts)
    learnt = [weight.requires_grad_() for weight in weights if weight is not None]
    with torch.enable_grad():
        surprise_NE, _ = closed_form_surprise(weights, found.x_ND, found.output_grad_ND, known_NE)
        mean_N1 = surprise_NE.detach().sum(-1, keepdim=True) / known_NE.sum(-1, keepdim=True)
        share_NE = _softmax(logits_NE, known_NE) / mean_N1.where(mean_N1 > 0, 1)
        lost = _mean(share_NE * surprise_NE, known_NE) * found.loss_scale * config.router_weight
    stacks = (experts.gate_proj, experts.up_proj, experts.down_proj)
    owners = [stack.weight for stack in stacks if stack is not None]
    for parameter, gradient in zip(owners, torch.autograd.grad(lost, learnt), strict=True):
        accumulate_grad(parameter, gradient)


@torch.no_grad()
def _report(
    surprise_NE: Tensor, size_NE: Tensor, known_NE: Tensor, usual: Tensor, upstream_N: Tensor
) -> dict[str, Tensor]:
    """Return statistics of the router. "surprise": S / |g|, summed over "pairs".
    "inactive_fraction": tokens, of "compared" with two candidates or more, whose candidate of least
    surprise has an output near zero beside `usual` |y|. "surprise_norm_corr": corr(S, |y|) times
    "compared".
    """
    pairs = known_NE.sum()
    relative_NE = surprise_NE / upstream_N.where(upstream_N > 0, torch.inf)[:, None]
    compared_N = known_NE.sum(-1) > 1
    least_N1 = surprise_NE.masked_fill(~known_NE, torch.inf).argmin(-1, keepdim=True)
    silent_N = size_NE.gather(-1, least_N1)[:, 0] <= INACTIVE_RATIO * usual
    centred = [x_NE - x_NE.sum() / pairs.clamp(min=1) for x_NE in (surprise_NE, size_NE)]
    one, other = (x_NE * known_NE for x_NE in centred)
    spread = one.norm() * other.norm()
    alike = (one * other).sum() / spread.where(spread > 0, 1)
    return {
        "surprise": relative_NE.sum(),
        "pairs": pairs,
        "inactive_fraction": (silent_N & compared_N).sum(),
        "surprise_norm_corr": alike * compared_N.sum(),
        "compared": compared_N.sum(),
    }

"""Surprise: how much a token asks an expert to change, the norm of its weights' gradient.

The gradient of a product y = W x by W is, for one token, dy x': its norm is |dy| |x|. So for an
expert h = silu(a) * b, a = W_gate x, b = W_up x, y = W_down h, and g the gradient that comes back
to the layer's output at this token,

    S^2 = |g|^2 |h|^2 + |x|^2 (|da|^2 + |db|^2)

with da and db as they come of dy = g (Goodfellow, 1510.01799, found the same for dense layers; for
relu(b)^2 there is no a). It is what autograd would say of a copy of the weights for each token,
including what a token does to others through layers above, at a cost of a few numbers per pair: the
one backward pass forms g, da and db anyway, and leaves their norms in zero tensors that took part
(`Out.grad_probes`). da and db there come of c g, c the expert's weight in the token's sum; S is
that of c = 1, or it would only say who has the smaller weight.

Legend: N tokens, E experts, P pairs of them, D width, H width of an expert.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.nn.moe.dispatch import combine, plan_from_mask
from tinsmith.nn.moe.experts import Experts
from tinsmith.nn.moe.grouped_gemm import autocast_operand, grouped_linear
from tinsmith.nn.precision import at_least_fp32


class _Watched(torch.autograd.Function):
    """y as it is; the probe's gradient is the squared norm of each row of y's."""

    @staticmethod
    def forward(ctx: Any, y_RX: Tensor, probe_R: Tensor) -> Tensor:
        ctx.kind = probe_R.dtype
        return y_RX.view_as(y_RX)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        (dy_RX,) = upstream
        return dy_RX, _squares(dy_RX, ctx.kind)


def attach_norm_probe(y_RX: Tensor, probe_R: Tensor) -> Tensor:
    """y; after backward, `probe.grad` has grown by |dy_r|^2 for each of its rows."""
    return _Watched.apply(y_RX, probe_R)  # type: ignore[return-value]


@torch.no_grad()
def _squares(x_RX: Tensor, kind: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(x_RX, dim=-1, dtype=kind).square()


class CollectedProbes(NamedTuple):
    """Of one layer and micro-batch, what the router learns from."""

    x_ND: Tensor
    active_NE: Tensor
    """bool: who worked on whom."""
    surprise_NE: Tensor
    """S; 0 where not active."""
    output_norm_NE: Tensor
    """|y|, the length of what each expert said; 0 where not active."""
    grad_norm_N: Tensor
    """Norm |g| of the output gradient of each token."""
    output_grad_ND: Tensor | None
    """g, where `listen` was asked for it."""
    loss_scale: Tensor
    """() what the layer's own losses were multiplied by."""


def attach_probes(
    experts: Experts, x_ND: Tensor, mask_NE: Tensor, weight_NE: Tensor, keep_output_grad: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The layer's output (N, D), and probes from which `heard` reads the surprise after backward.

    `whole` keeps g itself too. Weights must not be 0 where the mask is not. To `probes["share"]`,
    a zero, add one of the layer's losses: it hears how the trainer weighs them.
    """
    kind = at_least_fp32(x_ND.dtype)
    plan = plan_from_mask(mask_NE)
    inner_P, upstream_N, share = (
        torch.zeros(shape, dtype=kind, device=x_ND.device, requires_grad=True)
        for shape in (len(plan.tokens_P), len(x_ND), ())
    )

    def product(x_PD: Tensor, weight_EHD: Tensor, ends_E: Tensor) -> Tensor:
        return attach_norm_probe(grouped_linear(x_PD, weight_EHD, ends_E), inner_P)

    h_PH = experts.intermediate(plan.gather(autocast_operand(x_ND)), plan.ends_E, product)
    y_PD = grouped_linear(h_PH, experts.down_proj.weight, plan.ends_E)
    weights_P = plan.gather_weights(weight_NE)
    out_ND = attach_norm_probe(combine(y_PD, weights_P, plan, len(x_ND)), upstream_N)
    probes = {"inner": inner_P, "upstream": upstream_N, "share": share}
    if keep_output_grad:
        probes["gradient"] = torch.zeros_like(out_ND, requires_grad=True)
        out_ND = out_ND + probes["gradient"]
    probes |= {"x": x_ND.detach(), "active": mask_NE, "places": plan.flat_indices_P}
    probes |= {"hidden": _squares(h_PH, kind), "size": _squares(y_PD, kind).sqrt()}
    return out_ND, probes | {"weights": weights_P.detach().to(y_PD.dtype)}


AttachProbes = Callable[[Experts, Tensor, Tensor, Tensor, bool], tuple[Tensor, dict[str, Tensor]]]
"""`listen`, or the same kept away from a compiler."""


def collect_probes(grad_probes: dict[str, Tensor]) -> CollectedProbes | None:
    """What `listen`'s probes collected; None where no gradient came, or not that of the losses."""
    inner_P, upstream_N, share = (grad_probes[name].grad for name in ("inner", "upstream", "share"))
    if inner_P is None or upstream_N is None or share is None:
        return None
    x_ND, active_NE, places_P = grad_probes["x"], grad_probes["active"], grad_probes["places"]
    tokens_P = places_P // active_NE.shape[1]
    lengths_N = _squares(x_ND, upstream_N.dtype)
    inner_P = inner_P / grad_probes["weights"].to(inner_P.dtype).square()
    squared_P = upstream_N[tokens_P] * grad_probes["hidden"] + lengths_N[tokens_P] * inner_P
    whole = grad_probes["gradient"].grad if "gradient" in grad_probes else None

    def table(values_P: Tensor) -> Tensor:
        flat = values_P.new_zeros(active_NE.numel()).scatter(0, places_P, values_P)
        return flat.view(active_NE.shape).where(active_NE, 0)

    return CollectedProbes(
        x_ND,
        active_NE,
        table(squared_P.sqrt()),
        table(grad_probes["size"]),
        upstream_N.sqrt(),
        whole,
        share,
    )


class ExpertMatrices(NamedTuple):
    """Of all experts."""

    gate_EHD: Tensor | None
    up_EHD: Tensor
    down_EDH: Tensor


def closed_form_surprise(
    matrices: ExpertMatrices, x_ND: Tensor, output_grad_ND: Tensor, mask_NE: Tensor
) -> tuple[Tensor, Tensor]:
    """S and |y| (N, E) of the masked pairs, 0 elsewhere, by the formula alone: also of experts that
    did not work, and differentiable by the weights.
    """
    plan, kind = plan_from_mask(mask_NE), matrices.up_EHD.dtype
    x_PD, g_PD = plan.gather(x_ND).to(kind), plan.gather(output_grad_ND).to(kind)
    b_PH = grouped_linear(x_PD, matrices.up_EHD, plan.ends_E)
    dh_PH = grouped_linear(g_PD, matrices.down_EDH.mT, plan.ends_E)
    if matrices.gate_EHD is None:
        h_PH, inner = b_PH.relu().square(), [2 * b_PH.relu() * dh_PH]
    else:
        a_PH = grouped_linear(x_PD, matrices.gate_EHD, plan.ends_E)
        soft_PH = a_PH.sigmoid()
        slope_PH = soft_PH * (1 + a_PH * (1 - soft_PH))
        h_PH, inner = F.silu(a_PH) * b_PH, [dh_PH * b_PH * slope_PH, dh_PH * F.silu(a_PH)]
    within_P = sum(d_PH.square().sum(-1) for d_PH in inner)
    squared_P = g_PD.square().sum(-1) * h_PH.square().sum(-1) + x_PD.square().sum(-1) * within_P
    # the root has no slope at 0
    surprise_P = squared_P.where(squared_P > 0, 1).sqrt().where(squared_P > 0, 0)
    size_P = grouped_linear(h_PH.detach(), matrices.down_EDH.detach(), plan.ends_E).norm(dim=-1)
    tables = [
        values_P.new_zeros(mask_NE.numel())
        .scatter(0, plan.flat_indices_P, values_P)
        .view(mask_NE.shape)
        for values_P in (surprise_P, size_P)
    ]
    return tables[0], tables[1]

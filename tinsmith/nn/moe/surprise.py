"""Surprise of a token at an expert: the gradient norm of the expert's weights for that token.

The gradient of a product y = W x with respect to W is, for one token, dy x', with norm |dy| |x|. So
for an expert h = silu(a) * b, a = W_gate x, b = W_up x, y = W_down h, and g the gradient with
respect to the layer's output at this token,

    S^2 = |g|^2 |h|^2 + |x|^2 (|da|^2 + |db|^2)

with da and db from dy = g (Goodfellow, 1510.01799, found the same for dense layers; for relu(b)^2
there is no a). It equals the norm that autograd would compute with a copy of the weights for each
token, including the token's effect on other tokens through later layers, at the cost of a few
numbers per pair: the backward pass computes g, da and db anyway, and stores their norms in gradient
probes (zero tensors of `Out.grad_probes`). There da and db come from c g, with c the expert's
combine weight; S is that of c = 1, because otherwise it would mostly reflect which expert has the
smaller weight.

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


class _NormProbe(torch.autograd.Function):
    """The identity; the gradient of the probe is the squared norm of each row of the gradient."""

    @staticmethod
    def forward(ctx: Any, y_RX: Tensor, probe_R: Tensor) -> Tensor:
        ctx.kind = probe_R.dtype
        return y_RX.view_as(y_RX)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        (dy_RX,) = upstream
        return dy_RX, _squared_norms(dy_RX, ctx.kind)


def attach_norm_probe(y_RX: Tensor, probe_R: Tensor) -> Tensor:
    """Return y; backward adds |dy_r|^2 of every row r to `probe_R.grad`."""
    return _NormProbe.apply(y_RX, probe_R)  # type: ignore[return-value]


@torch.no_grad()
def _squared_norms(x_RX: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(x_RX, dim=-1, dtype=dtype).square()


class CollectedProbes(NamedTuple):
    """The inputs of the router's surprise loss, of one layer and micro-batch."""

    x_ND: Tensor
    active_NE: Tensor
    """bool: the selected experts of each token."""
    surprise_NE: Tensor
    """Surprise S; 0 if not active."""
    output_norm_NE: Tensor
    """Norm |y| of each expert's output; 0 if not active."""
    grad_norm_N: Tensor
    """Norm |g| of the output gradient of each token."""
    output_grad_ND: Tensor | None
    """The output gradient g, if `attach_probes` was called with `keep_output_grad`."""
    loss_scale: Tensor
    """(): the factor by which the trainer multiplied the layer's losses."""


def attach_probes(
    experts: Experts, x_ND: Tensor, mask_NE: Tensor, weight_NE: Tensor, keep_output_grad: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the layer's output (N, D) and the probes for `collect_probes`.

    `keep_output_grad` also keeps g itself. Weights must not be 0 where the mask is True. Add the
    scalar probe "loss_scale", which is 0, to one of the layer's losses: its gradient is the factor
    by which the trainer multiplies them.
    """
    dtype = at_least_fp32(x_ND.dtype)
    plan = plan_from_mask(mask_NE)
    inner_P, upstream_N, loss_scale = (
        torch.zeros(shape, dtype=dtype, device=x_ND.device, requires_grad=True)
        for shape in (len(plan.tokens_P), len(x_ND), ())
    )

    def matmul(x_PD: Tensor, weight_EHD: Tensor, ends_E: Tensor) -> Tensor:
        return attach_norm_probe(grouped_linear(x_PD, weight_EHD, ends_E), inner_P)

    h_PH = experts.intermediate(plan.gather(autocast_operand(x_ND)), plan.ends_E, matmul)
    y_PD = grouped_linear(h_PH, experts.down_proj.weight, plan.ends_E)
    weights_P = plan.gather_weights(weight_NE)
    y_ND = attach_norm_probe(combine(y_PD, weights_P, plan, len(x_ND)), upstream_N)
    probes = {"inner": inner_P, "upstream": upstream_N, "loss_scale": loss_scale}
    if keep_output_grad:
        probes["gradient"] = torch.zeros_like(y_ND, requires_grad=True)
        y_ND = y_ND + probes["gradient"]
    probes |= {"x": x_ND.detach(), "active": mask_NE, "flat_indices": plan.flat_indices_P}
    probes |= {
        "hidden": _squared_norms(h_PH, dtype),
        "output_norm": _squared_norms(y_PD, dtype).sqrt(),
    }
    return y_ND, probes | {"weights": weights_P.detach().to(y_PD.dtype)}


AttachProbes = Callable[[Experts, Tensor, Tensor, Tensor, bool], tuple[Tensor, dict[str, Tensor]]]
"""`attach_probes`, or the same function excluded from torch.compile."""


def collect_probes(grad_probes: dict[str, Tensor]) -> CollectedProbes | None:
    """Read the probes after backward; None if they, or the losses, got no gradient."""
    inner_P, upstream_N, loss_scale = (
        grad_probes[name].grad for name in ("inner", "upstream", "loss_scale")
    )
    if inner_P is None or upstream_N is None or loss_scale is None:
        return None
    x_ND, active_NE, flat_indices_P = (
        grad_probes["x"],
        grad_probes["active"],
        grad_probes["flat_indices"],
    )
    tokens_P = flat_indices_P // active_NE.shape[1]
    squared_norm_N = _squared_norms(x_ND, upstream_N.dtype)
    inner_P = inner_P / grad_probes["weights"].to(inner_P.dtype).square()
    squared_P = upstream_N[tokens_P] * grad_probes["hidden"] + squared_norm_N[tokens_P] * inner_P
    output_grad_ND = grad_probes["gradient"].grad if "gradient" in grad_probes else None

    def to_table(values_P: Tensor) -> Tensor:
        flat = values_P.new_zeros(active_NE.numel()).scatter(0, flat_indices_P, values_P)
        return flat.view(active_NE.shape).where(active_NE, 0)

    return CollectedProbes(
        x_ND,
        active_NE,
        to_table(squared_P.sqrt()),
        to_table(grad_probes["output_norm"]),
        upstream_N.sqrt(),
        output_grad_ND,
        loss_scale,
    )


class ExpertMatrices(NamedTuple):
    """The weights of all experts."""

    gate_EHD: Tensor | None
    up_EHD: Tensor
    down_EDH: Tensor


def closed_form_surprise(
    matrices: ExpertMatrices, x_ND: Tensor, output_grad_ND: Tensor, mask_NE: Tensor
) -> tuple[Tensor, Tensor]:
    """Return S and |y| (N, E) of the masked pairs, 0 elsewhere, from the formula alone.

    It covers experts that were not selected and is differentiable with respect to the weights.
    """
    plan, dtype = plan_from_mask(mask_NE), matrices.up_EHD.dtype
    x_PD, g_PD = plan.gather(x_ND).to(dtype), plan.gather(output_grad_ND).to(dtype)
    b_PH = grouped_linear(x_PD, matrices.up_EHD, plan.ends_E)
    dh_PH = grouped_linear(g_PD, matrices.down_EDH.mT, plan.ends_E)
    if matrices.gate_EHD is None:
        h_PH, inner_grads = b_PH.relu().square(), [2 * b_PH.relu() * dh_PH]
    else:
        a_PH = grouped_linear(x_PD, matrices.gate_EHD, plan.ends_E)
        sigmoid_PH = a_PH.sigmoid()
        silu_grad_PH = sigmoid_PH * (1 + a_PH * (1 - sigmoid_PH))
        h_PH, inner_grads = F.silu(a_PH) * b_PH, [dh_PH * b_PH * silu_grad_PH, dh_PH * F.silu(a_PH)]
    inner_P = sum(d_PH.square().sum(-1) for d_PH in inner_grads)
    squared_P = g_PD.square().sum(-1) * h_PH.square().sum(-1) + x_PD.square().sum(-1) * inner_P
    # the gradient of the square root is infinite at 0
    surprise_P = squared_P.where(squared_P > 0, 1).sqrt().where(squared_P > 0, 0)
    norm_P = grouped_linear(h_PH.detach(), matrices.down_EDH.detach(), plan.ends_E).norm(dim=-1)
    tables = [
        values_P.new_zeros(mask_NE.numel())
        .scatter(0, plan.flat_indices_P, values_P)
        .view(mask_NE.shape)
        for values_P in (surprise_P, norm_P)
    ]
    return tables[0], tables[1]

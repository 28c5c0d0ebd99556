"""How far a student's distribution over the vocabulary is from a teacher's.

With p = softmax(student / tau) and q = softmax(teacher / tau):

    forward   KL(q || p)                                          (Hinton et al., 1503.02531)
    reverse   KL(p || q)                                          (Gu et al., 2306.08543)
    jsd       beta KL(q || m) + (1 - beta) KL(p || m),  m = (1 - beta) p + beta q
                                                                  (Agarwal et al., 2306.13649)

beta 0 stands for the forward KL and beta 1 for the reverse KL, as in trl. Value and slope are
formed together, in at least float32, and are exactly 0 where both say the same.

Legend: N tokens, n tokens of a chunk, D width, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinsmith.losses.chunked_head import TokenLosses, chunked_head_loss, matmul_dtype
from tinsmith.losses.logprobs import cross_entropy_with_grad
from tinsmith.nn.precision import at_least_fp32


class DistillWeights(NamedTuple):
    """(1 - hard) * scale * divergence + hard * cross-entropy of the label."""

    beta: float
    temperature: float
    scale: float = 1.0
    ce_weight: float = 0.0


class HeadInputs(NamedTuple):
    """What a model makes of N tokens: logits are hidden @ weight.T."""

    hidden_ND: Tensor
    weight_VD: Tensor


def token_divergence(
    student_NV: Tensor, teacher_NV: Tensor, beta: float, temperature: float
) -> Tensor:
    """Of every token the divergence (N,), in nats; only the student gets a gradient."""
    return _Divergence.apply(student_NV, teacher_NV, beta, temperature)  # type: ignore[return-value]


def summed_divergence(
    student: HeadInputs,
    teacher: HeadInputs,
    targets_N: Tensor,
    weights_N: Tensor,
    mix: DistillWeights,
) -> tuple[Tensor, Tensor]:
    """sum over tokens of weight * mix, a scalar; and the same sums of the divergence and of the
    cross-entropy alone, (2,), without gradient. Nothing of (tokens x vocabulary) is held at once.
    """
    low = matmul_dtype(teacher.hidden_ND)
    taught_ND, head_VD = (part.detach().to(low) for part in teacher)

    def measure(logits_nV: Tensor, part: slice) -> TokenLosses:
        taught_nV = (taught_ND[part] @ head_VD.T).to(logits_nV.dtype)
        apart_n, slope_nV = divergence_with_grad(logits_nV, taught_nV, mix.beta, mix.temperature)
        label = cross_entropy_with_grad(logits_nV, targets_N[part])
        soft = (1 - mix.ce_weight) * mix.scale
        loss_n = soft * apart_n + mix.ce_weight * label.loss_n
        slope_nV = slope_nV.mul_(soft).add_(label.grad_nV, alpha=mix.ce_weight)
        return TokenLosses(loss_n, slope_nV, (apart_n, label.loss_n))

    return chunked_head_loss(student.hidden_ND, student.weight_VD, weights_N, measure)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_NV: Tensor, teacher_NV: Tensor, beta: float, temperature: float
    ) -> Tensor:
        each_N, slope_NV = divergence_with_grad(student_NV, teacher_NV, beta, temperature)
        ctx.save_for_backward(slope_NV.to(student_NV.dtype))
        return each_N

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (slope_NV,) = ctx.saved_tensors
        return slope_NV * upstream[0][:, None].to(slope_NV.dtype), None, None, None


@torch.no_grad()
def divergence_with_grad(
    student_NV: Tensor, teacher_NV: Tensor, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Of every token the divergence (N,), in nats, and its slope d / d student logits (N, V)."""
    high = torch.promote_types(at_least_fp32(student_NV.dtype), at_least_fp32(teacher_NV.dtype))
    student = (student_NV.to(high) / temperature).log_softmax(1)
    teacher = (teacher_NV.to(high) / temperature).log_softmax(1)
    if beta == 0:
        each_N, slope_NV = _forward(student, teacher)
    elif beta == 1:
        each_N, slope_NV = _reverse(student, teacher)
    else:
        each_N, slope_NV = _between(student, teacher, beta)
    return each_N, slope_NV.div_(temperature)


def _forward(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    q_NV = teacher_NV.exp()
    each_N = teacher_NV.sub_(student_NV).mul_(q_NV).sum(1)
    return each_N, student_NV.exp_().sub_(q_NV)


def _reverse(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    p_NV = student_NV.exp()
    gap_NV = student_NV.sub_(teacher_NV)
    each_N1 = (p_NV * gap_NV).sum(1, keepdim=True)
    return each_N1[:, 0], gap_NV.sub_(each_N1).mul_(p_NV)


def _between(student_NV: Tensor, teacher_NV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """d / d p is (1 - beta) ln(p / m): what m changes by cancels, since m and p sum to 1."""
    p_NV, q_NV = student_NV.exp(), teacher_NV.exp()
    gap_NV = student_NV.sub_(teacher_NV)
    own_NV = _over_mixture(gap_NV, beta)
    own_N1 = (p_NV * own_NV).sum(1, keepdim=True)
    other_N = q_NV.mul_(own_NV - gap_NV).sum(1)
    each_N = (1 - beta) * own_N1[:, 0] + beta * other_N
    return each_N, own_NV.sub_(own_N1).mul_(p_NV).mul_(1 - beta)


def _over_mixture(gap: Tensor, beta: float) -> Tensor:
    """ln(p / m) from gap = ln(p / q): 0 where p = q, and finite wherever `gap` is."""
    above = -torch.log1p(beta * torch.expm1(-gap))
    below = gap - torch.log1p((1 - beta) * torch.expm1(gap))
    return torch.where(gap >= 0, above, below)

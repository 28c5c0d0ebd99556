"""Divergences between the distributions of a student and a teacher over the vocabulary.

With p = softmax(student / tau) and q = softmax(teacher / tau):

    forward   KL(q || p)                                          (Hinton et al., 1503.02531)
    reverse   KL(p || q)                                          (Gu et al., 2306.08543)
    jsd       beta KL(q || m) + (1 - beta) KL(p || m),  m = (1 - beta) p + beta q
                                                                  (Agarwal et al., 2306.13649)

beta 0 selects the forward KL and beta 1 the reverse KL, as in TRL. Value and gradient are computed
together, in at least float32, and are exactly 0 for equal logits.

Legend: N tokens, n tokens of a chunk, D width, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinsmith.losses.chunked_head import TokenLosses, chunked_head_loss, matmul_dtype
from tinsmith.losses.logprobs import cross_entropy_with_grad
from tinsmith.nn.precision import at_least_fp32


class DistillWeights(NamedTuple):
    """Weights of (1 - ce_weight) * scale * divergence + ce_weight * cross-entropy of the label."""

    beta: float
    temperature: float
    scale: float = 1.0
    ce_weight: float = 0.0


class HeadInputs(NamedTuple):
    """The hidden states of N tokens and the head; logits are hidden @ weight.T."""

    hidden_ND: Tensor
    weight_VD: Tensor


def token_divergence(
    student_NV: Tensor, teacher_NV: Tensor, beta: float, temperature: float
) -> Tensor:
    """Return the divergence of every token (N,), in nats; only the student gets a gradient."""
    return _Divergence.apply(student_NV, teacher_NV, beta, temperature)  # type: ignore[return-value]


def summed_divergence(
    student: HeadInputs,
    teacher: HeadInputs,
    targets_N: Tensor,
    weights_N: Tensor,
    mix: DistillWeights,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the token losses of `mix`, and of their two terms, without
    gradient.

    The terms are the divergence and the cross-entropy, (2,). Logits of (tokens x vocabulary) are
    never stored completely.
    """
    dtype = matmul_dtype(teacher.hidden_ND)
    teacher_ND, teacher_VD = (tensor.detach().to(dtype) for tensor in teacher)

    def loss_fn(logits_nV: Tensor, chunk: slice) -> TokenLosses:
        teacher_nV = (teacher_ND[chunk] @ teacher_VD.T).to(logits_nV.dtype)
        divergence_n, grad_nV = divergence_with_grad(
            logits_nV, teacher_nV, mix.beta, mix.temperature
        )
        label = cross_entropy_with_grad(logits_nV, targets_N[chunk])
        divergence_weight = (1 - mix.ce_weight) * mix.scale
        loss_n = divergence_weight * divergence_n + mix.ce_weight * label.loss_n
        grad_nV = grad_nV.mul_(divergence_weight).add_(label.grad_nV, alpha=mix.ce_weight)
        return TokenLosses(loss_n, grad_nV, (divergence_n, label.loss_n))

    return chunked_head_loss(student.hidden_ND, student.weight_VD, weights_N, loss_fn)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_NV: Tensor, teacher_NV: Tensor, beta: float, temperature: float
    ) -> Tensor:
        divergence_N, grad_NV = divergence_with_grad(student_NV, teacher_NV, beta, temperature)
        ctx.save_for_backward(grad_NV.to(student_NV.dtype))
        return divergence_N

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NV,) = ctx.saved_tensors
        return grad_NV * upstream[0][:, None].to(grad_NV.dtype), None, None, None


@torch.no_grad()
def divergence_with_grad(
    student_NV: Tensor, teacher_NV: Tensor, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the divergence of every token (N,), in nats, and its gradient for student logits (N,
    V).
    """
    dtype = torch.promote_types(at_least_fp32(student_NV.dtype), at_least_fp32(teacher_NV.dtype))
    student = (student_NV.to(dtype) / temperature).log_softmax(1)
    teacher = (teacher_NV.to(dtype) / temperature).log_softmax(1)
    if beta == 0:
        divergence_N, grad_NV = _forward_kl(student, teacher)
    elif beta == 1:
        divergence_N, grad_NV = _reverse_kl(student, teacher)
    else:
        divergence_N, grad_NV = _jsd(student, teacher, beta)
    return divergence_N, grad_NV.div_(temperature)


def _forward_kl(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    q_NV = teacher_NV.exp()
    kl_N = teacher_NV.sub_(student_NV).mul_(q_NV).sum(1)
    return kl_N, student_NV.exp_().sub_(q_NV)


def _reverse_kl(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    p_NV = student_NV.exp()
    log_ratio_NV = student_NV.sub_(teacher_NV)
    kl_N1 = (p_NV * log_ratio_NV).sum(1, keepdim=True)
    return kl_N1[:, 0], log_ratio_NV.sub_(kl_N1).mul_(p_NV)


def _jsd(student_NV: Tensor, teacher_NV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The gradient for p is (1 - beta) ln(p / m): the terms from the change of m cancel, as m and p
    sum to 1.
    """
    p_NV, q_NV = student_NV.exp(), teacher_NV.exp()
    log_ratio_NV = student_NV.sub_(teacher_NV)
    log_p_over_m_NV = _log_ratio_to_mixture(log_ratio_NV, beta)
    student_kl_N1 = (p_NV * log_p_over_m_NV).sum(1, keepdim=True)
    teacher_kl_N = q_NV.mul_(log_p_over_m_NV - log_ratio_NV).sum(1)
    jsd_N = (1 - beta) * student_kl_N1[:, 0] + beta * teacher_kl_N
    return jsd_N, log_p_over_m_NV.sub_(student_kl_N1).mul_(p_NV).mul_(1 - beta)


def _log_ratio_to_mixture(log_ratio: Tensor, beta: float) -> Tensor:
    """Return ln(p / m) from log_ratio = ln(p / q): 0 where p = q, finite where the input is."""
    above = -torch.log1p(beta * torch.expm1(-log_ratio))
    below = log_ratio - torch.log1p((1 - beta) * torch.expm1(log_ratio))
    return torch.where(log_ratio >= 0, above, below)

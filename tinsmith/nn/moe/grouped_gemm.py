"""Grouped GEMM: products of groups of rows, each group with a matrix of its own.

    grouped linear   y_p = W_e x_p              for the rows p of group e
    grouped outer    G_e = sum_p dy_p x_p'      over the rows p of group e

Group e has the rows from `ends[e - 1]` (0 for the first) to `ends[e]`; rows past the last end
belong to no group, and their output is 0. Each operator is the gradient of the other, so
derivatives of any order exist. On a GPU they use `F.grouped_mm`, which does not synchronise;
elsewhere, and in float64, they loop over products, which is as fast on a CPU. Both operators are
opaque to torch.compile.

Legend: P rows (pairs of an expert and a token), E groups (experts), I inputs, O outputs.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x_PI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply each row by the matrix of its group, a linear layer per group; returns (P, O).

    `ends_E` is int32, ascending, at most P. Under autocast both operands are cast as by `F.linear`.
    """
    return _grouped(autocast_operand(x_PI), autocast_operand(weight_EOI), ends_E)


def autocast_operand(x: Tensor) -> Tensor:
    """Cast x to the dtype that autocast uses for products; float64 is not cast."""
    device = x.device.type
    mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if mixed and x.dtype != torch.float64 else x


def grouped_outer(dy_PO: Tensor, x_PI: Tensor, ends_E: Tensor) -> Tensor:
    """Return the sum over each group's rows of the outer products of dy and x, (E, O, I).

    This is the gradient of `grouped_linear` with respect to its weights; 0 for an empty group.
    """
    return _outer(dy_PO, x_PI, ends_E)


def group_slices(ends_E: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield (index, slice of rows) of every non-empty group. Synchronises with a GPU."""
    start = 0
    for group, end in enumerate(ends_E.tolist()):
        if end > start:
            yield group, slice(start, end)
        start = end


def grouped_linear_loop(x_PI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`grouped_linear` on any device and in any precision."""
    y_PO = x_PI.new_empty(len(x_PI), weight_EOI.shape[1])
    last = 0
    for group, rows in group_slices(ends_E):
        torch.mm(x_PI[rows], weight_EOI[group].mT, out=y_PO[rows])
        last = rows.stop
    y_PO[last:] = 0
    return y_PO


def grouped_outer_loop(dy_PO: Tensor, x_PI: Tensor, ends_E: Tensor) -> Tensor:
    """`grouped_outer` on any device and in any precision."""
    sums_EOI = x_PI.new_zeros(len(ends_E), dy_PO.shape[1], x_PI.shape[1])
    for group, rows in group_slices(ends_E):
        torch.mm(dy_PO[rows].mT, x_PI[rows], out=sums_EOI[group])
    return sums_EOI


def _grouped_mm_supports(*matrices: Tensor) -> bool:
    """Whether `F.grouped_mm` takes these: bfloat16, rows aligned to 16 bytes."""
    return all(x.dtype == torch.bfloat16 and x.shape[-1] % 8 == 0 for x in matrices)


def grouped_linear_cuda(x_PI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`grouped_linear` by torch's grouped kernel if it supports the operands."""
    if not (_grouped_mm_supports(x_PI, weight_EOI, weight_EOI.mT) and len(x_PI)):
        return grouped_linear_loop(x_PI, weight_EOI, ends_E)
    y_PO = F.grouped_mm(x_PI.contiguous(), weight_EOI.mT, offs=ends_E)
    beyond_P = torch.arange(len(y_PO), device=y_PO.device) >= ends_E[-1]
    return y_PO.masked_fill_(beyond_P[:, None], 0)


def grouped_outer_cuda(dy_PO: Tensor, x_PI: Tensor, ends_E: Tensor) -> Tensor:
    """`grouped_outer` by torch's grouped kernel if it supports the operands."""
    if not (_grouped_mm_supports(dy_PO, x_PI) and len(x_PI)):
        return grouped_outer_loop(dy_PO, x_PI, ends_E)
    return F.grouped_mm(dy_PO.contiguous().mT, x_PI.contiguous(), offs=ends_E)


_grouped = torch.library.custom_op("tinsmith::grouped", grouped_linear_loop, mutates_args=())
_outer = torch.library.custom_op("tinsmith::grouped_outer", grouped_outer_loop, mutates_args=())


_grouped.register_kernel("cuda", grouped_linear_cuda)
_outer.register_kernel("cuda", grouped_outer_cuda)


@_grouped.register_fake
def _(x_PI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return x_PI.new_empty(x_PI.shape[0], weight_EOI.shape[1])


@_outer.register_fake
def _(dy_PO: Tensor, x_PI: Tensor, ends_E: Tensor) -> Tensor:
    return x_PI.new_empty(ends_E.shape[0], dy_PO.shape[1], x_PI.shape[1])


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_backward(ctx: Any, dy_PO: Tensor) -> tuple[Tensor | None, ...]:
    x_PI, weight_EOI, ends_E = ctx.saved_tensors
    dx, dweight = ctx.needs_input_grad[:2]
    return (
        _grouped(dy_PO, weight_EOI.mT, ends_E) if dx else None,
        _outer(dy_PO, x_PI, ends_E) if dweight else None,
        None,
    )


def _outer_backward(ctx: Any, dsums_EOI: Tensor) -> tuple[Tensor | None, ...]:
    dy_PO, x_PI, ends_E = ctx.saved_tensors
    ddy, dx = ctx.needs_input_grad[:2]
    return (
        _grouped(x_PI, dsums_EOI, ends_E) if ddy else None,
        _grouped(dy_PO, dsums_EOI.mT, ends_E) if dx else None,
        None,
    )


_grouped.register_autograd(_grouped_backward, setup_context=_save_inputs)
_outer.register_autograd(_outer_backward, setup_context=_save_inputs)

"""Muon: an optimizer that orthogonalises the momentum of every matrix.

    m <- mu m + (1 - mu) g
    u  = mu m + (1 - mu) g  with Nesterov, else m
    W <- (1 - lr decay) W - lr scale NS(u)

NS is five steps of a Newton-Schulz iteration that brings every singular value near 1, so that all
directions of a matrix change about equally. Keller Jordan, "Muon: an optimizer for hidden layers"
(2024), https://kellerjordan.github.io/posts/muon/; the scale `match_rms_adamw` is from Moonlight
(2502.16982). Differs from `torch.optim.Muon`: it also takes stacks (E, rows, columns), each slice a
matrix of its own, and parameters sharded by FSDP2, and it batches matrices of the same shape,
transposed ones included. For a sharded matrix every rank gathers the momentum and computes the
complete update; stacks sharded by slices are updated locally.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinsmith.distributed.dtensor import full_tensor, is_sharded_on_dim0, local_tensor, shard_like

Scale = Literal["original", "match_rms_adamw"]

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a s + b s^3 + c s^5 of a singular value s; steep at 0, so singular values end in 0.68 to 1.13."""

BATCH_ELEMENTS = 2**23
"""Largest number of elements in one batched iteration: enough for all cores, small enough for
caches, and a bound on the memory of a step in addition to the momentum.
"""


def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Return the nearly orthogonal factor of each matrix.

    `matrices` (..., rows, columns) -> the same shape in `dtype`, which is the precision of the
    products; norms are computed in at least float32. For a matrix U S V' the result is about U V';
    a zero matrix stays zero.
    """
    a, b, c = NS_COEFFICIENTS
    norm_dtype = torch.promote_types(matrices.dtype, torch.float32)
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=norm_dtype)
    x = matrices.to(dtype) / norms.clamp(min=1e-7).to(dtype)
    x = x.reshape(-1, *matrices.shape[-2:])
    transpose = x.shape[-2] > x.shape[-1]
    if transpose:
        x = x.mT
    gram = x.new_empty(len(x), x.shape[-2], x.shape[-2])
    polynomial, buffer = torch.empty_like(gram), torch.empty_like(x)
    for _ in range(steps):
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        torch.baddbmm(x, polynomial, x, beta=a, out=buffer)
        x, buffer = buffer, x
    return (x.mT if transpose else x).reshape(matrices.shape)


def fast_matmul_dtype(tensor: Tensor) -> torch.dtype:
    """Return bfloat16 if the device multiplies it faster than float32, else float32.

    The device decides, not a measurement, so that a resumed run computes the same numbers. float64
    stays float64.
    """
    if tensor.dtype == torch.float64:
        return torch.float64
    has_fast_bfloat16 = {"cuda": _gpu_has_bfloat16, "cpu": _cpu_has_bfloat16}
    is_fast = has_fast_bfloat16.get(tensor.device.type, bool)()
    return torch.bfloat16 if is_fast else torch.float32


def _gpu_has_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _cpu_has_bfloat16() -> bool:
    """AMX or AVX512-BF16: without these instructions bfloat16 products are slower."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


class Muon(torch.optim.Optimizer):
    """Muon for matrices (rows, columns) and stacks of them (E, rows, columns).

    `ns_dtype` sets the precision of the Newton-Schulz products; the default is `fast_matmul_dtype`.
    State: `momentum` in the parameter's shape, at least float32. Gradients are not changed; a
    parameter without gradient is skipped.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        scale: Scale = "original",
        ns_dtype: torch.dtype | None = None,
    ):
        options = {"lr": lr, "momentum": momentum, "nesterov": nesterov}
        options |= {"weight_decay": weight_decay, "steps": ns_steps, "scale": scale}
        super().__init__(parameters, options | {"products": ns_dtype})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() not in (2, 3):
                    shape = tuple(parameter.shape)
                    raise ValueError(f"Muon takes matrices and stacks of matrices, not {shape}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters. Every rank must have gradients for the same parameters."""
        for group in self.param_groups:
            for batch in _batches([p for p in group["params"] if p.grad is not None]):
                self._step(batch, group)

    def _step(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        stacks = [_wide(self._direction(parameter, group)) for parameter in parameters]
        ns_dtype = group["products"] or fast_matmul_dtype(parameters[0])
        updates = newton_schulz(_concatenate(stacks), group["steps"], ns_dtype)
        for parameter, update in zip(
            parameters, updates.split(list(map(len, stacks))), strict=True
        ):
            _apply_update(parameter, update, group)

    def _direction(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """Update the momentum; return the matrix or stack to be orthogonalised, gathered if
        necessary.
        """
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = initial_momentum(parameter)
        momentum: Tensor = state["momentum"]
        gradient = parameter.grad.to(momentum.dtype)
        momentum.lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        return local_tensor(direction) if is_sharded_on_dim0(parameter) else full_tensor(direction)


def initial_momentum(parameter: nn.Parameter) -> Tensor:
    """Return zeros in the shape of the parameter, at least float32."""
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))


def _apply_update(parameter: nn.Parameter, update: Tensor, group: dict[str, Any]) -> None:
    """Apply an update (slices, short side, long side) to one parameter."""
    rows, columns = parameter.shape[-2:]
    update = update.mT if rows > columns else update
    if not is_sharded_on_dim0(parameter):
        update = shard_like(update.reshape(parameter.shape), parameter)
    weight, lr = local_tensor(parameter), group["lr"]
    if group["weight_decay"]:
        weight.mul_(1 - lr * group["weight_decay"])
    weight.add_(update, alpha=-lr * _scale(group["scale"], rows, columns))


def _wide(direction: Tensor) -> Tensor:
    """Return (slices, short side, long side)."""
    rows, columns = direction.shape[-2:]
    stack = direction.reshape(-1, rows, columns)
    return stack.mT if rows > columns else stack


def _concatenate(stacks: list[Tensor]) -> Tensor:
    """Concatenate stacks; `torch.cat` takes three times as long if they are transposed."""
    result = stacks[0].new_empty(sum(map(len, stacks)), *stacks[0].shape[1:])
    for target, matrix in zip(result, chain.from_iterable(stacks), strict=True):
        target.copy_(matrix)
    return result


def _batches(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield parameters with matrices of the same shape, in a fixed order, of limited size."""

    def shape_key(parameter: nn.Parameter) -> tuple[str, str, int, int]:
        short, long = sorted(parameter.shape[-2:])
        return str(parameter.device), str(parameter.dtype), short, long

    for _, same_shape in groupby(sorted(parameters, key=shape_key), key=shape_key):
        batch: list[nn.Parameter] = []
        remaining = BATCH_ELEMENTS
        for parameter in same_shape:
            if batch and parameter.numel() > remaining:
                yield batch
                batch, remaining = [], BATCH_ELEMENTS
            batch.append(parameter)
            remaining -= parameter.numel()
        yield batch


def _scale(scale: Scale, rows: int, columns: int) -> float:
    return (
        math.sqrt(max(1, rows / columns))
        if scale == "original"
        else 0.2 * math.sqrt(max(rows, columns))
    )

"""Muon: momentum whose matrices are orthogonalised before they move the weights.

    m <- mu m + (1 - mu) g
    u  = mu m + (1 - mu) g  with Nesterov, else m
    W <- (1 - lr decay) W - lr scale NS(u)

NS is five steps of a Newton-Schulz iteration that brings every singular value near 1, so that all
directions of a matrix move about equally far. Keller Jordan, "Muon: an optimizer for hidden layers"
(2024), https://kellerjordan.github.io/posts/muon/; the scale `match_rms_adamw` is from Moonlight
(2502.16982). It differs from `torch.optim.Muon` in taking stacks (E, rows, columns) too, each slice
a matrix of its own, and parameters spread by FSDP2, and in putting matrices with the same sides,
lying or standing, through one batched iteration. Of a spread matrix every rank gathers the momentum
and computes the whole update; stacks spread by slices are updated where they are.
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
"""Of a s + b s^3 + c s^5 on singular values; steep at 0, hence they end near 1 (0.68 to 1.13)."""

BATCH_ELEMENTS = 2**23
"""How many numbers one batched iteration takes in: enough to keep cores busy, little enough for
caches, and a bound on the memory that a step needs beyond the momentum.
"""


def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """The nearly orthogonal factor of each matrix.

    `matrices` (..., rows, columns) -> the same shape in `dtype`, which is the precision of the
    products; norms are taken in at least float32. For a matrix U S V' the result is about U V'; a
    zero matrix stays zero.
    """
    a, b, c = NS_COEFFICIENTS
    wide = torch.promote_types(matrices.dtype, torch.float32)
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=wide)
    x = matrices.to(dtype) / norms.clamp(min=1e-7).to(dtype)
    x = x.reshape(-1, *matrices.shape[-2:])
    standing = x.shape[-2] > x.shape[-1]
    if standing:
        x = x.mT
    gram = x.new_empty(len(x), x.shape[-2], x.shape[-2])
    polynomial, spare = torch.empty_like(gram), torch.empty_like(x)
    for _ in range(steps):
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        torch.baddbmm(x, polynomial, x, beta=a, out=spare)
        x, spare = spare, x
    return (x.mT if standing else x).reshape(matrices.shape)


def fast_matmul_dtype(tensor: Tensor) -> torch.dtype:
    """The precision of the products: bfloat16 where the device multiplies it faster than float32.

    Told by the device, not by timing, so that a resumed run computes what the first one would have.
    float64 stays float64.
    """
    if tensor.dtype == torch.float64:
        return torch.float64
    multiplies_bfloat16 = {"cuda": _gpu_has_bfloat16, "cpu": _cpu_has_bfloat16}
    fast = multiplies_bfloat16.get(tensor.device.type, bool)()
    return torch.bfloat16 if fast else torch.float32


def _gpu_has_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _cpu_has_bfloat16() -> bool:
    """AMX or AVX512-BF16: without their instructions bfloat16 products are slower."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


class Muon(torch.optim.Optimizer):
    """Muon over matrices (rows, columns) and stacks of them (E, rows, columns).

    `products` fixes the precision of the Newton-Schulz products; by default `product_dtype`
    chooses. State: `momentum` of the parameter's shape, at least float32. Gradients are read, never
    changed; a parameter without one is skipped.
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
        """One update. Every rank must have gradients for the same parameters."""
        for group in self.param_groups:
            for batch in _batches([p for p in group["params"] if p.grad is not None]):
                self._step(batch, group)

    def _step(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        stacks = [_lying(self._direction(parameter, group)) for parameter in parameters]
        products = group["products"] or fast_matmul_dtype(parameters[0])
        updates = newton_schulz(_joined(stacks), group["steps"], products)
        for parameter, update in zip(
            parameters, updates.split(list(map(len, stacks))), strict=True
        ):
            _move(parameter, update, group)

    def _direction(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """What is to be orthogonalised: (rows, columns) or (slices, rows, columns), unspread."""
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
    """The momentum of a parameter that never moved: zeros, at least float32."""
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))


def _move(parameter: nn.Parameter, update: Tensor, group: dict[str, Any]) -> None:
    """One weight's step by its `update` (slices, short side, long side)."""
    rows, columns = parameter.shape[-2:]
    update = update.mT if rows > columns else update
    if not is_sharded_on_dim0(parameter):
        update = shard_like(update.reshape(parameter.shape), parameter)
    weight, lr = local_tensor(parameter), group["lr"]
    if group["weight_decay"]:
        weight.mul_(1 - lr * group["weight_decay"])
    weight.add_(update, alpha=-lr * _scale(group["scale"], rows, columns))


def _lying(direction: Tensor) -> Tensor:
    """(slices, short side, long side)."""
    rows, columns = direction.shape[-2:]
    stack = direction.reshape(-1, rows, columns)
    return stack.mT if rows > columns else stack


def _joined(stacks: list[Tensor]) -> Tensor:
    """All slices in one stack; `torch.cat` takes three times as long where they are transposed."""
    joined = stacks[0].new_empty(sum(map(len, stacks)), *stacks[0].shape[1:])
    for place, matrix in zip(joined, chain.from_iterable(stacks), strict=True):
        place.copy_(matrix)
    return joined


def _batches(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters whose matrices have the same sides, in a fixed order, not too many at once."""

    def kind(parameter: nn.Parameter) -> tuple[str, str, int, int]:
        short, long = sorted(parameter.shape[-2:])
        return str(parameter.device), str(parameter.dtype), short, long

    for _, alike in groupby(sorted(parameters, key=kind), key=kind):
        batch: list[nn.Parameter] = []
        room = BATCH_ELEMENTS
        for parameter in alike:
            if batch and parameter.numel() > room:
                yield batch
                batch, room = [], BATCH_ELEMENTS
            batch.append(parameter)
            room -= parameter.numel()
        yield batch


def _scale(scale: Scale, rows: int, columns: int) -> float:
    return (
        math.sqrt(max(1, rows / columns))
        if scale == "original"
        else 0.2 * math.sqrt(max(rows, columns))
    )

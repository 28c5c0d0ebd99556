"""Low-rank adapters (LoRA: Hu et al., 2106.09685), added to any model by a pass over its modules.

    y = W x + s B A dropout(x)        s = alpha / rank, or alpha / sqrt(rank) (rsLoRA, 2312.03732)

W is frozen, and B is initialised to 0. A linear layer computes the two small products, a router in
its own precision. Code that reads a weight directly gets W + s B A: absorbed latents, oneDNN's
layout (`infer.onednn_weights`), and stacks of experts, where each expert has its own A and B
(PEFT's `target_parameters`).

An adapted module has its own class with an adapter in `module.lora[parameter]`, so that W keeps its
name and place: state has `q_proj.weight` as before and `q_proj.lora.weight.A` and `.B` beside it.

Legend: E experts (not there for linear layers), O and I the last two sides of a weight as it is
stored, R rank.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import new_class
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.core.errors import UserError
from tinsmith.core.parse import Config, Size
from tinsmith.nn.moe.router import RouterLinear, router_logits
from tinsmith.nn.parameters import count_parameters, freeze_except, match_targets
from tinsmith.nn.precision import at_least_fp32, no_autocast


@dataclass(frozen=True, kw_only=True)
class LoRA(Config):
    """Which weights are adapted, and how.

    A target, one or several, is the last name or names of a linear layer (`q_proj`, `mixer.q_proj`)
    or of a stack of experts, or a pattern over the whole name (`blocks.[0-3].mixer.*`); `all` is
    every linear layer.
    """

    targets: str | tuple[str, ...] = "all"
    rank: Size = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("targets must name at least one layer; all is every linear layer")
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"alpha={self.alpha} must be a number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")

    @property
    def scaling(self) -> float:
        """Scaling of the adapter's update: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRAWeights(NamedTuple):
    """What an adapter has learned."""

    A: Tensor
    """(E, R, I)"""
    B: Tensor
    """(E, O, R)"""

    def merged_weight(self, weight_EOI: Tensor, scaling: float) -> Tensor:
        """W + s B A, formed in at least float32, in the dtype of W."""
        kind = at_least_fp32(weight_EOI.dtype)
        with no_autocast(weight_EOI.device):
            delta_EOI = self.B.to(kind) @ self.A.to(kind) * scaling
            return (weight_EOI.to(kind) + delta_EOI).to(weight_EOI.dtype)


class Adapter(nn.Module):
    """A and B of one weight, in at least float32: A uniform as Kaiming has it, B zero."""

    ROLE: ClassVar[Literal["matrix"]] = "matrix"

    def __init__(self, weight_EOI: Tensor, config: LoRA):
        super().__init__()
        *stack, rows, columns = weight_EOI.shape
        made = {"dtype": at_least_fp32(weight_EOI.dtype), "device": weight_EOI.device}
        self.A = nn.Parameter(torch.empty(*stack, config.rank, columns, **made))
        self.B = nn.Parameter(torch.zeros(*stack, rows, config.rank, **made))
        nn.init.uniform_(self.A, -1 / math.sqrt(columns), 1 / math.sqrt(columns))
        self.scaling, self.dropout = config.scaling, config.dropout
        self.enabled = True
        self.original: Tensor | None = None
        """W, while the adapter is merged into its place."""

    @property
    def is_active(self) -> bool:
        """Whether it has something to add."""
        return self.enabled and self.original is None

    def merged_weight(self, weight_EOI: Tensor) -> Tensor:
        """W + s B A."""
        return LoRAWeights(self.A, self.B).merged_weight(weight_EOI, self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        """s B A dropout(x), (..., I) -> (..., O), for linear layers."""
        low = F.linear(F.dropout(x.to(self.A.dtype), self.dropout, self.training), self.A)
        return F.linear(low, self.B) * self.scaling


class Adapted(nn.Module):
    """A module some of whose weights have adapters, in `lora` by name."""

    lora: nn.ModuleDict


class AdaptedLinear(Adapted, nn.Linear):
    """A linear layer with an adapter of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        y = F.linear(input, _stored(self, "weight"), self.bias)
        adapter = _adapter(self, "weight")
        return y + adapter(input).to(y.dtype) if adapter.is_active else y


class AdaptedRouter(Adapted, RouterLinear):
    """A gate with an adapter of its weight: as exact as without."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) -> logits (..., E)."""
        logits = router_logits(input, _stored(self, "weight"))
        adapter = _adapter(self, "weight")
        if not adapter.is_active:
            return logits
        with no_autocast(input.device):
            return logits + adapter(input)


def _stored(module: nn.Module, name: str) -> nn.Parameter:
    """W itself: where it lies, not what `module.name` reads."""
    return cast(nn.Parameter, module._parameters[name])


def _adapter(module: Adapted, name: str) -> Adapter:
    return cast(Adapter, module.lora[name])


def _reading(name: str) -> property:
    def read(module: Adapted) -> Tensor:
        weight, adapter = _stored(module, name), _adapter(module, name)
        return adapter.merged_weight(weight) if adapter.is_active else weight

    return property(read)


def _adapted_base(kind: type[nn.Module]) -> type[Adapted]:
    if issubclass(kind, RouterLinear):
        return AdaptedRouter
    return AdaptedLinear if issubclass(kind, nn.Linear) else Adapted


@cache
def _adapted_kind(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class that reads `names` with their adapters, and is `kind` for the rest."""
    read = {name: _reading(name) for name in names}
    bases = (_adapted_base(kind), kind)
    return new_class(f"Adapted{kind.__name__}", bases, None, lambda body: body.update(read))


def add_adapters(model: nn.Module, config: LoRA) -> None:
    """Freeze all of `model` and give every target an adapter, which is all that is trained then.

    A's first values come from torch's global generator. UserError where a target names nothing that
    can be adapted, or where dropout is asked of a stack of experts, which has no place for it.
    """
    assert not adapters(model), "the model has adapters already"
    targets = (config.targets,) if isinstance(config.targets, str) else config.targets
    found = match_targets(model, targets)
    stacks = [each for each in found if not isinstance(each.module, nn.Linear)]
    if config.dropout and stacks:
        raise UserError(
            f"lora.dropout: {config.dropout:g}, but {stacks[0].name} is a stack of experts, whose "
            "inputs are not seen here; set it to 0"
        )
    freeze_except(model, ())
    for module in dict.fromkeys(each.module for each in found):
        names = [each.param_name for each in found if each.module is module]
        made = {name: Adapter(_stored(module, name), config) for name in names}
        module.__class__ = _adapted_kind(type(module), tuple(names))
        module.lora = nn.ModuleDict(made).train(module.training)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters by the names of the weights that they adapt."""
    return {name: _adapter(module, key) for name, module, key in _adapted(model)}


def _adapted(model: nn.Module) -> Iterator[tuple[str, Adapted, str]]:
    """Every adapted weight: its name, its module, its name there."""
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            for key in module.lora:
                yield f"{name}.{key}".removeprefix("."), module, key


def describe(model: nn.Module, config: LoRA) -> str:
    """What is trained and what is not, for people."""
    kinds = dict.fromkeys(name.removesuffix(".weight").split(".")[-1] for name in adapters(model))
    rank = f"rank {config.rank}, alpha {config.alpha:g}"
    return f"{count_parameters(model)} | {rank} on {', '.join(kinds)}"


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Put W + s B A in the place of every W; adapters are silent until `unmerge`."""
    for _, module, key in _adapted(model):
        weight, adapter = _stored(module, key), _adapter(module, key)
        if adapter.original is None:
            adapter.original = weight.detach().clone()
            weight.copy_(adapter.merged_weight(weight))


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Put every W back, to the bit: `merge` has kept it."""
    for _, module, key in _adapted(model):
        adapter = _adapter(module, key)
        if adapter.original is not None:
            _stored(module, key).copy_(adapter.original)
            adapter.original = None


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is the one without adapters. It must not be merged."""
    switched = list(adapters(model).values())
    if any(adapter.original is not None for adapter in switched):
        raise ValueError("merged adapters cannot be switched off; unmerge the model first")
    before = [adapter.enabled for adapter in switched]
    try:
        for adapter in switched:
            adapter.enabled = False
        yield
    finally:
        for adapter, enabled in zip(switched, before, strict=True):
            adapter.enabled = enabled


_LEAF = re.compile(r"(?:(.*)\.)?lora\.(\w+)\.([AB])")


def split_state_dict(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, LoRAWeights]]:
    """A model's state (tensors, or whatever stands for them) as that of the model without adapters,
    and the adapters by the names of their weights.
    """
    base: dict[str, Any] = {}
    halves: dict[str, dict[str, Any]] = {}
    for name, tensor in state.items():
        match = _LEAF.fullmatch(name)
        if match is None:
            base[name] = tensor
        else:
            owner = f"{match[1]}." if match[1] else ""
            halves.setdefault(owner + match[2], {})[match[3]] = tensor
    return base, {name: LoRAWeights(half["A"], half["B"]) for name, half in halves.items()}


def merged_state_dict(
    base: dict[str, Tensor], pairs: dict[str, LoRAWeights], scaling: float
) -> dict[str, Tensor]:
    """The state of a plain model with adapters folded into its weights."""
    return base | {name: pair.merged_weight(base[name], scaling) for name, pair in pairs.items()}

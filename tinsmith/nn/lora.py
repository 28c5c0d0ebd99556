"""Low-rank adapters (LoRA: Hu et al., 2106.09685), added to the modules of any model.

    y = W x + s B A dropout(x)        s = alpha / rank, or alpha / sqrt(rank) (rsLoRA, 2312.03732)

W is frozen, and B is initialised to 0. A linear layer computes the two small products; a router
does so in its own precision. Code that reads a weight directly gets W + s B A: absorbed queries of
latent attention, oneDNN's layout (`infer.onednn_weights`), and stacks of experts, where each expert
has its own A and B (PEFT's `target_parameters`).

Embeddings of new token ids cannot be learned through A and B. With `trainable_tokens_from` the rows
of the embedding and of the head from that id on are trained (PEFT's `trainable_token_indices`).

An adapted module gets a class of its own and an adapter in `module.lora[parameter]`, so W keeps its
name: the state dict has `q_proj.weight` as before, and `q_proj.lora.weight.A` and `.B`.

Legend: E experts (absent for linear layers), O and I the last two dimensions of a weight as it is
stored, R rank.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import new_class
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.core.errors import UserError
from tinsmith.core.parse import Config, Count, Size
from tinsmith.nn.layers.linear import LMHead
from tinsmith.nn.moe.router import RouterLinear, router_logits
from tinsmith.nn.parameters import count_parameters, freeze_except, match_targets
from tinsmith.nn.precision import at_least_fp32, no_autocast


@dataclass(frozen=True, kw_only=True)
class LoRA(Config):
    """Which weights get adapters, and their hyperparameters.

    A target is the last part of the name of a linear layer (`q_proj`, `mixer.q_proj`) or of a stack
    of experts, or a pattern over the whole name (`blocks.[0-3].mixer.*`); `all` is every linear
    layer. There may be one target or several.
    """

    targets: str | tuple[str, ...] = "all"
    rank: Size = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    trainable_tokens_from: Count | None = None
    """Train the rows of embedding and head of token ids from this one on. `tinsmith train` sets it
    to the first id that it adds to the vocabulary of `init_from`.
    """

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
    """The weights of an adapter."""

    A: Tensor
    """(E, R, I)"""
    B: Tensor
    """(E, O, R)"""

    def merged_weight(self, weight_EOI: Tensor, scaling: float) -> Tensor:
        """Return W + s B A, computed in at least float32, in the dtype of W."""
        dtype = at_least_fp32(weight_EOI.dtype)
        with no_autocast(weight_EOI.device):
            delta_EOI = self.B.to(dtype) @ self.A.to(dtype) * scaling
            return (weight_EOI.to(dtype) + delta_EOI).to(weight_EOI.dtype)


class RowWeights(NamedTuple):
    """Trained rows of an embedding or a head."""

    first: int
    """Token id of the first row."""
    rows: Tensor
    """(V - first, D)"""

    def merged_weight(self, weight_VD: Tensor, scaling: float) -> Tensor:
        """Return the weight with its last rows replaced. It may grow."""
        return torch.cat((weight_VD[: self.first], self.rows.to(weight_VD.dtype)))


AdapterWeights = LoRAWeights | RowWeights


class WeightAdapter(nn.Module):
    """The trained part of an adapted weight. It can be disabled, or merged into the weight."""

    dropout = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.original: Tensor | None = None
        """The weight without the adapter, while the adapter is merged into the weight."""

    @property
    def is_active(self) -> bool:
        """Whether the adapter is enabled and not merged."""
        return self.enabled and self.original is None

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Return the weight with the adapter, in the dtype of `weight`."""
        raise NotImplementedError


class TokenRows(WeightAdapter):
    """Trained rows (V - first, D) of an embedding or a head, in at least float32."""

    ROLE: ClassVar[Literal["embedding"]] = "embedding"

    def __init__(self, weight_VD: Tensor, first: int):
        super().__init__()
        self.first = first
        rows = weight_VD.detach()[first:]
        self.rows = nn.Parameter(rows.to(at_least_fp32(rows.dtype), copy=True))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Return the weight with the trained rows."""
        return RowWeights(self.first, self.rows).merged_weight(weight, 1.0)


class Adapter(WeightAdapter):
    """A and B of one weight, in at least float32: A is Kaiming-uniform, B is 0."""

    ROLE: ClassVar[Literal["matrix"]] = "matrix"

    def __init__(self, weight_EOI: Tensor, config: LoRA):
        super().__init__()
        *stack, rows, columns = weight_EOI.shape
        factory = {"dtype": at_least_fp32(weight_EOI.dtype), "device": weight_EOI.device}
        self.A = nn.Parameter(torch.empty(*stack, config.rank, columns, **factory))
        self.B = nn.Parameter(torch.zeros(*stack, rows, config.rank, **factory))
        nn.init.uniform_(self.A, -1 / math.sqrt(columns), 1 / math.sqrt(columns))
        self.scaling, self.dropout = config.scaling, config.dropout

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Return W + s B A in the dtype of W."""
        return LoRAWeights(self.A, self.B).merged_weight(weight, self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        """Return s B A dropout(x), (..., I) to (..., O), for linear layers."""
        low = F.linear(F.dropout(x.to(self.A.dtype), self.dropout, self.training), self.A)
        return F.linear(low, self.B) * self.scaling


class Adapted(nn.Module):
    """A module with adapters in `lora`, by the names of the adapted weights."""

    lora: nn.ModuleDict


class AdaptedLinear(Adapted, nn.Linear):
    """A linear layer with an adapter of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        y = F.linear(input, _base_weight(self, "weight"), self.bias)
        adapter = _adapter(self, "weight")
        return y + adapter(input).to(y.dtype) if adapter.is_active else y


class AdaptedRouter(Adapted, RouterLinear):
    """A router with an adapter of its weight, in the router's precision."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., D) to logits (..., E)."""
        logits = router_logits(input, _base_weight(self, "weight"))
        adapter = _adapter(self, "weight")
        if not adapter.is_active:
            return logits
        with no_autocast(input.device):
            return logits + adapter(input)


def _base_weight(module: nn.Module, name: str) -> nn.Parameter:
    """Return W itself, while `module.name` may return W + s B A."""
    return cast(nn.Parameter, module._parameters[name])


def _adapter(module: Adapted, name: str) -> WeightAdapter:
    return cast(WeightAdapter, module.lora[name])


def _merged_property(name: str) -> property:
    def read(module: Adapted) -> Tensor:
        weight, adapter = _base_weight(module, name), _adapter(module, name)
        return adapter.merged_weight(weight) if adapter.is_active else weight

    return property(read)


def _adapted_base(module_class: type[nn.Module]) -> type[Adapted]:
    if issubclass(module_class, RouterLinear):
        return AdaptedRouter
    is_linear = issubclass(module_class, nn.Linear) and not issubclass(module_class, LMHead)
    return AdaptedLinear if is_linear else Adapted


@cache
def _adapted_class(module_class: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return a subclass of `module_class` whose weights `names` include their adapters."""
    properties = {name: _merged_property(name) for name in names}
    bases = (_adapted_base(module_class), module_class)
    return new_class(
        f"Adapted{module_class.__name__}", bases, None, lambda body: body.update(properties)
    )


def add_adapters(model: nn.Module, config: LoRA) -> None:
    """Freeze `model` and add an adapter to every target; only the adapters are trained.

    A is initialised from torch's global generator. UserError if a target matches nothing, or if
    dropout is set for a stack of experts, which cannot have it.
    """
    assert not adapters(model), "the model has adapters already"
    targets = (config.targets,) if isinstance(config.targets, str) else config.targets
    matched = match_targets(model, targets)
    stacks = [weight for weight in matched if not isinstance(weight.module, nn.Linear)]
    if config.dropout and stacks:
        raise UserError(
            f"lora.dropout: {config.dropout:g}, but {stacks[0].name} is a stack of experts, whose "
            "adapters cannot drop inputs; set it to 0"
        )
    freeze_except(model, ())
    for module in dict.fromkeys(weight.module for weight in matched):
        names = [weight.param_name for weight in matched if weight.module is module]
        new_adapters = {name: Adapter(_base_weight(module, name), config) for name in names}
        module.__class__ = _adapted_class(type(module), tuple(names))
        module.lora = nn.ModuleDict(new_adapters).train(module.training)
    if config.trainable_tokens_from is not None:
        _train_token_rows(model, config.trainable_tokens_from)


def _train_token_rows(model: nn.Module, first: int) -> None:
    """Add trained rows to the embedding and the head, which share them if they are tied."""
    modules = [model.get_submodule(name) for name in ("embed", "head")]
    embed_weight, head_weight = (_base_weight(module, "weight") for module in modules)
    rows = TokenRows(embed_weight, first)
    for module in modules:
        module.__class__ = _adapted_class(type(module), ("weight",))
    embed, head = modules
    embed.lora = nn.ModuleDict({"weight": rows})
    if head_weight is embed_weight:
        head.__dict__["lora"] = {"weight": rows}  # not registered twice
    else:
        head.lora = nn.ModuleDict({"weight": TokenRows(head_weight, first)})


def adapters(model: nn.Module) -> dict[str, WeightAdapter]:
    """Return the adapters by the names of the weights that they adapt."""
    return {name: _adapter(module, key) for name, module, key in _adapted_weights(model)}


def _adapted_weights(model: nn.Module) -> Iterator[tuple[str, Adapted, str]]:
    """Yield every adapted weight: its name, its module and its name in the module."""
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            for key in module.lora:
                yield f"{name}.{key}".removeprefix("."), module, key


def describe(model: nn.Module, config: LoRA) -> str:
    """Describe the counts of parameters, rank, alpha and adapted layers in one line."""
    layers = dict.fromkeys(
        name.removesuffix(".weight").split(".")[-1]
        for name, adapter in adapters(model).items()
        if isinstance(adapter, Adapter)
    )
    rank = f"rank {config.rank}, alpha {config.alpha:g} on {', '.join(layers)}"
    first = config.trainable_tokens_from
    rows = "" if first is None else f", embeddings of token ids from {first} on"
    return f"{count_parameters(model)} | {rank}{rows}"


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Replace every W by W + s B A; adapters are inactive until `unmerge`."""
    for _, module, key in _adapted_weights(model):
        weight, adapter = _base_weight(module, key), _adapter(module, key)
        if adapter.original is None:
            adapter.original = weight.detach().clone()
            weight.copy_(adapter.merged_weight(weight))


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Restore every W bit for bit from the copy that `merge` kept."""
    for _, module, key in _adapted_weights(model):
        adapter = _adapter(module, key)
        if adapter.original is not None:
            _base_weight(module, key).copy_(adapter.original)
            adapter.original = None


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Run `model` without its adapters inside the context. They must not be merged."""
    all_adapters = list(adapters(model).values())
    if any(adapter.original is not None for adapter in all_adapters):
        raise ValueError("merged adapters cannot be disabled; unmerge the model first")
    were_enabled = [adapter.enabled for adapter in all_adapters]
    try:
        for adapter in all_adapters:
            adapter.enabled = False
        yield
    finally:
        for adapter, enabled in zip(all_adapters, were_enabled, strict=True):
            adapter.enabled = enabled


_ADAPTER_NAME = re.compile(r"(?:(.*)\.)?lora\.(\w+)\.(A|B|rows)")


def split_state_dict(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, AdapterWeights]]:
    """Split a state dict into that of the model without adapters and the adapters by weight name.

    Values may be tensors or anything that stands for them.
    """
    base: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in state.items():
        match = _ADAPTER_NAME.fullmatch(name)
        if match is None:
            base[name] = tensor
        else:
            prefix = f"{match[1]}." if match[1] else ""
            parts.setdefault(prefix + match[2], {})[match[3]] = tensor
    return base, {
        name: RowWeights(base[name].shape[0] - part["rows"].shape[0], part["rows"])
        if "rows" in part
        else LoRAWeights(part["A"], part["B"])
        for name, part in parts.items()
    }


def merged_state_dict(
    base: dict[str, Tensor], weights: Mapping[str, AdapterWeights], scaling: float
) -> dict[str, Tensor]:
    """Return the state dict of the base model with adapters merged into its weights."""
    return base | {name: part.merged_weight(base[name], scaling) for name, part in weights.items()}

"""The contract between the model and its parts. Read this first.

A block is `Residual(Mixer)` then `Residual(FeedForward)`. Every variant of a slot is one file with
one frozen config dataclass and one module; the union type in the slot folder's `__init__` is the
list of variants. What a layer has to say travels in its return value (`Out`), what it may read in
its arguments (`x`, `Ctx`, cache): nothing is stored on modules, nothing in `Ctx` is mutated, so
activation checkpointing and compilation change nothing.

Shape suffixes: B rows, T tokens of this call, S keys, D width, V vocabulary, E experts.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tinsmith.core.parse import Config

TensorSplit = Literal["column", "row"]
"""How a linear layer is split over a tensor-parallel group."""


class Out(NamedTuple):
    """What every sub-layer and block returns."""

    y: Tensor
    """(B, T, D); the residual state, from a Block."""
    losses: dict[str, Tensor] = {}
    """Differentiable means over this batch, times the layer's own coefficient. The default is
    shared: merge with `|`.
    """
    stats: dict[str, Tensor] = {}
    """Detached observations, as sums that may be added over micro-batches and ranks."""
    grad_probes: dict[str, Tensor] = {}
    """Zero tensors that took part in forward and collect in `.grad` what only backward knows; and
    beside them, detached, what is needed to read it.
    """
    value_residual: Tensor | None = None
    """What this mixer offers to later layers (value residual), (B, T, kv_heads, head_dim)."""


Rotary = tuple[Tensor, Tensor]
"""cos and signed sin, each (B or 1, T, rotary_dim), ready for `attention.rope.apply_rotary_emb`."""


class Ctx(NamedTuple):
    """What a sub-layer may read besides x."""

    positions: Tensor
    """(B, T) absolute positions; they restart at document borders when packed."""
    segments: Tensor | None = None
    """(B, T) document ids >= 0. Attention never crosses them; -1 marks padding, which nothing
    attends to, routes or counts. None: every row is one document (with a cache: it goes on)."""
    value_residual: Tensor | None = None
    """The value first offered by a layer below."""
    rotary: dict[int, Rotary] = {}
    """Rotary tables of these positions by rotary width; made once by the model for every width
    its mixers name.
    """


class BuildContext(NamedTuple):
    """Where a part is built, and what it shares with the rest of its model."""

    dim: int
    layer_idx: int
    depth: int
    norm_eps: float = 1e-5
    attention: str = "sdpa"
    attention_dropout: float = 0.0
    use_rope: bool = True
    attention_scaling: float = 1.0
    """What the rotary tables multiply queries and keys by (YaRN's temperature)."""
    is_value_residual_source: bool = False
    """True where this mixer is the first of the model to offer its values."""
    sublayer_idx: int = 0
    """Which sub-layer of the model a residual stands around: 2 layer for a mixer's, 2 layer + 1 for
    a feed-forward's.
    """


class CacheFull(Exception):
    """A row would hold more tokens than its cache has room for."""


class CannotTruncate(Exception):
    """A cache was asked to forget tokens whose predecessors it no longer holds."""


class LayerCache(Protocol):
    """One mixer's memory for a batch of rows. Engine and model never look inside it."""

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens absorbed per row."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows: batching, best-of-n, beams. `rows` (N,) int64."""
        ...

    def truncate(self, lengths: Tensor) -> None:
        """Forget the newest tokens so that row b holds `lengths[b]`; raises CannotRewind if it
        cannot.
        """
        ...

    def join(self, other: Any) -> None:
        """Append the rows of another cache of the same mixer; capacities may differ."""
        ...

    def nbytes(self) -> int:
        """Bytes of the tensors that hold the memory."""
        ...


@dataclass(frozen=True, kw_only=True)
class PartConfigBase(Config):
    """Base of the config of a mixer, feed-forward or residual."""

    kind: str

    def check(self, dim: int) -> None:
        """Raise ValueError, with the key's name, where this part cannot be built at width `dim`."""


class MixerConfigBase(PartConfigBase):
    """Base of every mixer's config."""

    def build(self, build_ctx: BuildContext) -> "Mixer":
        """Build the module."""
        raise NotImplementedError

    def value_residual_shape(self, dim: int) -> tuple[int, int] | None:
        """(kv_heads, head_dim) where this mixer takes part in the value residual."""
        return None


class FeedForwardConfigBase(PartConfigBase):
    """Base of every feed-forward's config."""

    def build(self, build_ctx: BuildContext) -> "FeedForward":
        """Build the module."""
        raise NotImplementedError


class ResidualConfigBase(PartConfigBase):
    """Base of every residual's config; `expand` and `collapse` stand before layer 0 and before
    the final norm.
    """

    def build(self, build_ctx: BuildContext) -> "Residual":
        """The module, one per sub-layer."""
        raise NotImplementedError

    def expand(self, x: Tensor) -> Tensor:
        """(B, T, D) -> the residual state."""
        raise NotImplementedError

    def collapse(self, h: Tensor) -> Tensor:
        """The residual state -> (B, T, D)."""
        raise NotImplementedError


class Mixer(nn.Module):
    """Mixes over time. `rotary_dim` names the width of the rotary tables it wants, if any."""

    rotary_dim: int | None = None

    def forward(self, x: Tensor, ctx: Ctx, cache: Any = None) -> Out:
        """x (B, T, D) normalised input -> Out.y (B, T, D)."""
        raise NotImplementedError

    def new_cache(
        self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """An empty memory for `rows` rows of up to `capacity` tokens."""
        raise NotImplementedError

    def flops(self, seq_len: int) -> int:
        """Floating-point operations per token of a forward pass over `context` tokens (a
        multiply-add is two).
        """
        raise NotImplementedError

    def tensor_plan(self) -> dict[str, TensorSplit]:
        """Return how linear layers are split over a tensor-parallel group, by module name.

        Modules that are not named are replicated. A column split divides the outputs of a layer and
        a row split its inputs, so a column-split layer followed by a row-split one needs a single
        all-reduce (Megatron-LM, 1909.08053).
        """
        return {}


class FeedForward(nn.Module):
    """Works on each token alone."""

    def forward(self, x: Tensor, ctx: Ctx) -> Out:
        """x (B, T, D) normalised input -> Out.y (B, T, D)."""
        raise NotImplementedError

    def flops(self) -> int:
        """Floating-point operations per token of a forward pass."""
        raise NotImplementedError

    def tensor_plan(self) -> dict[str, TensorSplit]:
        """Return how linear layers are split over a tensor-parallel group, by module name.

        Modules that are not named are replicated. A column split divides the outputs of a layer and
        a row split its inputs, so a column-split layer followed by a row-split one needs a single
        all-reduce (Megatron-LM, 1909.08053).
        """
        return {}


class Residual(nn.Module):
    """One per sub-layer; owns its mixing weights."""

    def read(self, h: Tensor) -> tuple[Tensor, Any]:
        """Stream(s) -> sub-layer input (B, T, D), and what `write` needs."""
        raise NotImplementedError

    def write(self, h: Tensor, y: Tensor, saved: Any) -> Tensor:
        """The residual state after the sub-layer said y (B, T, D)."""
        raise NotImplementedError

    def flops(self) -> int:
        """Floating-point operations per token of a read and a write, products only."""
        raise NotImplementedError

    def activation_bytes(self) -> int:
        """Bytes per token that a read and a write keep for the backward pass, beside what every
        sub-layer keeps.
        """
        raise NotImplementedError


class OptimizerReset(NamedTuple):
    """The optimizer forgets what it remembered of these rows of a parameter."""

    parameter: nn.Parameter
    rows: Tensor


class Routed:
    """Mixin of any mixer or feed-forward with a router; LM walks its modules and forwards the
    calls.
    """

    def after_backward(self, grad_probes: dict[str, Tensor]) -> dict[str, Tensor]:
        """Routers that learn from gradients add theirs, from the `.grad` of the probes of their
        own layer; returns statistics that only backward knows, as sums like `Out.stats`.
        """
        return {}

    def post_step(self, stats: dict[str, Tensor]) -> list[OptimizerReset]:
        """Loss-free bias, re-birth of experts: the only place besides the optimizer where model
        state changes.
        """
        return []

    def router_state(self) -> dict[str, Tensor]:
        """What people watch drift while it trains, (E,) each: thresholds, biases; 0 at first."""
        return {}

    def expert_mask(self, x: Tensor, ctx: Ctx) -> Tensor:
        """(B, T, E) bool: which experts work on which tokens of this input, none on padding."""
        raise NotImplementedError

    def inactive_parameters(self) -> int:
        """How many of its parameters one token does not meet, on average."""
        return 0

"""The interface between the model and its mixers, feed-forwards and residuals. Read this first.

A block is `Residual(Mixer)` followed by `Residual(FeedForward)`. Each variant of a slot is one file
with one frozen config dataclass and one module. The union type in `__init__.py` of the slot's
folder lists the variants. A layer reads its arguments (`x`, `Ctx`, cache) and returns everything it
computes (`Out`). It stores nothing on modules and mutates nothing in `Ctx`, so activation
checkpointing, which runs `forward` twice, and torch.compile change no result.

Shape suffixes: B rows, T tokens of this call, S keys, D width, V vocabulary, E experts.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tinsmith.core.parse import Config
from tinsmith.nn.attention.span import PackedDocuments, Span, attention_span, pack_documents

TensorSplit = Literal["column", "row"]
"""How a linear layer is split over a tensor-parallel group."""


class Out(NamedTuple):
    """The output of a sub-layer or block."""

    y: Tensor
    """(B, T, D). A block returns the residual state."""
    losses: dict[str, Tensor] = {}
    """Auxiliary losses: differentiable means over this batch, multiplied by the layer's
    coefficient. The default is shared between all `Out`, so merge with `|` and do not mutate it.
    """
    stats: dict[str, Tensor] = {}
    """Detached statistics for logging and balancing. They are sums, so that those of micro-batches
    and ranks can be added.
    """
    grad_probes: dict[str, Tensor] = {}
    """Gradient probes: zero tensors added in forward, whose `.grad` after backward is the gradient
    at that point, and detached tensors of the forward pass that `Routed.after_backward` reads with
    them.
    """
    value_residual: Tensor | None = None
    """Values (B, T, kv_heads, head_dim) that later layers may mix into theirs (value residual)."""


Rotary = tuple[Tensor, Tensor]
"""cos and signed sin (B or 1, T, rotary_dim), as `attention.rope.apply_rotary_emb` takes them."""


class Ctx(NamedTuple):
    """What all sub-layers of a forward pass read besides x. Immutable.

    `Ctx(positions, segments)` is enough to call a layer on its own. `LM.forward` fills in the other
    fields once per forward pass, for all layers.
    """

    positions: Tensor
    """(B, T) position ids. In packed rows they restart at each document."""
    segments: Tensor | None = None
    """(B, T) document ids >= 0, or -1 for padding. Attention never crosses documents, and padding
    is not attended to, routed or counted. None: every row is one document, which continues that of
    the cache if there is one.
    """
    value_residual: Tensor | None = None
    """`Out.value_residual` of the first layer that returned one."""
    rotary: dict[int, Rotary] = {}
    """Rotary tables of the positions, by rotary width, for every `Mixer.rotary_dim`."""
    spans: dict[int | None, Span] = {}
    """Attention spans by window, for whole documents (None) and every `Mixer.window`; empty with a
    cache. Read them with `span`.
    """
    packed: PackedDocuments | None = None
    """Document boundaries for variable-length kernels, if a mixer has `needs_cu_seqlens`. Read them
    with `packed_documents`.
    """

    def span(self, window: int | None = None) -> Span:
        """Return which tokens of this call each token attends to: its document up to itself, or the
        last `window` tokens of it.

        Without a cache only: with one, the cache returns the span (`KVCache.append`). A window that
        is no mixer's `window` is computed anew in each call.
        """
        if window in self.spans:
            return self.spans[window]
        length, device = self.positions.shape[1], self.positions.device
        return attention_span(self.segments, length, window, device)

    def packed_documents(self) -> PackedDocuments:
        """Return the documents of this batch without padding, with `cu_seqlens` and `max_seqlen`.

        Their shapes depend on `segments`, and `max_seqlen` is read from the device, so a model that
        uses them on packed rows does not compile to a single graph. They are computed anew in each
        call unless the mixer has `needs_cu_seqlens`.
        """
        if self.packed is not None:
            return self.packed
        batch_size, length = self.positions.shape
        return pack_documents(self.segments, batch_size, length, self.positions.device)


class BuildContext(NamedTuple):
    """The position of a part in the model, and the options that all layers share."""

    dim: int
    layer_idx: int
    depth: int
    norm_eps: float = 1e-5
    attention: str = "sdpa"
    attention_dropout: float = 0.0
    use_rope: bool = True
    attention_scaling: float = 1.0
    """Factor of the rotary tables, which multiplies queries and keys (YaRN's temperature)."""
    is_value_residual_source: bool = False
    """True for the first mixer of the model that returns `Out.value_residual`."""
    sublayer_idx: int = 0
    """Index of the sub-layer that a residual wraps: 2 layer_idx for a mixer, 2 layer_idx + 1 for a
    feed-forward.
    """


class CacheFull(Exception):
    """Appending tokens would exceed the capacity of a cache."""


class CannotTruncate(Exception):
    """A cache cannot be truncated, because it no longer holds the earlier state."""


class Truncatable(Protocol):
    """A state of tokens whose newest ones can be removed."""

    def check_truncate(self, lengths: Tensor) -> None:
        """Raise CannotTruncate if the state after those tokens is no longer known."""
        ...

    def truncate(self, lengths: Tensor) -> None:
        """Remove the newest tokens, so that row b keeps its first `lengths[b]`, or raise as
        `check_truncate` does and change nothing. The caches of a model have `truncate_caches`.
        """
        ...


class LayerCache(Truncatable, Protocol):
    """The cache of one mixer for a batch of rows: keys and values, or a recurrent state.

    Model and engine use these methods only. `attention.cache` holds keys and values,
    `nn.recurrent` the state of a recurrence.
    """

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens appended per row."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows, for batching, best-of-n and beams. `rows` (N,) int64."""
        ...

    def join(self, other: Any) -> None:
        """Append the rows of another cache of the same mixer. Capacities may differ."""
        ...

    def nbytes(self) -> int:
        """Return the size of the cached tensors in bytes."""
        ...


def truncate_caches(caches: Iterable[Truncatable], lengths: Tensor) -> None:
    """Remove the newest tokens from several caches, such as those of all layers: from all or, if
    one raises CannotTruncate, from none.
    """
    caches = list(caches)
    for cache in caches:
        cache.check_truncate(lengths)
    for cache in caches:
        cache.truncate(lengths)


@dataclass(frozen=True, kw_only=True)
class PartConfigBase(Config):
    """Base of the config of a mixer, feed-forward or residual."""

    kind: str

    def check(self, dim: int) -> None:
        """Raise ValueError that names the key if this part cannot be built at width `dim`."""


class MixerConfigBase(PartConfigBase):
    """Base of every mixer's config."""

    def build(self, build_ctx: BuildContext) -> "Mixer":
        """Build the module."""
        raise NotImplementedError

    def value_residual_shape(self, dim: int) -> tuple[int, int] | None:
        """Return (kv_heads, head_dim) if this mixer uses the value residual, else None."""
        return None


class FeedForwardConfigBase(PartConfigBase):
    """Base of every feed-forward's config."""

    def build(self, build_ctx: BuildContext) -> "FeedForward":
        """Build the module."""
        raise NotImplementedError


class ResidualConfigBase(PartConfigBase):
    """Base of every residual's config. `expand` is applied before the first block and `collapse`
    before the final norm.
    """

    def build(self, build_ctx: BuildContext) -> "Residual":
        """Build the module of one sub-layer."""
        raise NotImplementedError

    def expand(self, x: Tensor) -> Tensor:
        """Return the initial residual state of x (B, T, D)."""
        raise NotImplementedError

    def collapse(self, h: Tensor) -> Tensor:
        """Return the hidden states (B, T, D) of a residual state."""
        raise NotImplementedError


class Mixer(nn.Module):
    """Mixes tokens over time: attention, a recurrence, a convolution."""

    rotary_dim: int | None = None
    """Width of the tables that it reads from `ctx.rotary`, if any."""
    window: int | None = None
    """Sliding window that it passes to `ctx.span`, if any, besides whole documents."""
    needs_cu_seqlens: bool = False
    """True if it calls `ctx.packed_documents`."""

    def forward(self, x: Tensor, ctx: Ctx, cache: Any = None) -> Out:
        """Return Out.y (B, T, D) for the normalised input x (B, T, D).

        With a cache, append the T tokens to it; y then depends on all tokens of a row.
        """
        raise NotImplementedError

    def new_cache(
        self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """Return an empty cache for `batch_size` rows of up to `capacity` tokens."""
        raise NotImplementedError

    def flops(self, seq_len: int) -> int:
        """Return the floating-point operations per token of a forward pass over `seq_len` tokens. A
        multiply-add counts as two.
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
    """Transforms each token independently: an MLP or a mixture of experts."""

    def forward(self, x: Tensor, ctx: Ctx) -> Out:
        """Return Out.y (B, T, D) for the normalised input x (B, T, D)."""
        raise NotImplementedError

    def flops(self) -> int:
        """Return the floating-point operations per token of a forward pass."""
        raise NotImplementedError

    def tensor_plan(self) -> dict[str, TensorSplit]:
        """Return how linear layers are split over a tensor-parallel group, as `Mixer` does."""
        return {}


class Residual(nn.Module):
    """The residual connection around one sub-layer, with its own weights if it has any."""

    def read(self, h: Tensor) -> tuple[Tensor, Any]:
        """Return the sub-layer's input (B, T, D) from the residual state, and a value that is
        passed on to `write`.
        """
        raise NotImplementedError

    def write(self, h: Tensor, y: Tensor, saved: Any) -> Tensor:
        """Return the residual state after adding the sub-layer's output y (B, T, D)."""
        raise NotImplementedError

    def flops(self) -> int:
        """Return the floating-point operations per token of the matrix products in `read` and
        `write`.
        """
        raise NotImplementedError

    def activation_bytes(self) -> int:
        """Return the bytes per token that `read` and `write` save for the backward pass, beyond
        those that every sub-layer saves.
        """
        raise NotImplementedError


class OptimizerReset(NamedTuple):
    """Rows of a parameter that were re-initialised, so that the optimizer resets their state."""

    parameter: nn.Parameter
    rows: Tensor


class Routed:
    """Mixin of mixers and feed-forwards with a router. `LM` calls its methods on all of them."""

    def after_backward(self, grad_probes: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return statistics that depend on gradients, as sums like `Out.stats`.

        Called after the backward pass with this layer's `Out.grad_probes`. A router that is trained
        by them adds its gradient to its parameters here.
        """
        return {}

    def post_step(self, stats: dict[str, Tensor]) -> list[OptimizerReset]:
        """Update balancing biases and re-initialise dead experts after an optimizer step.

        `stats` are those of the global batch. Besides the optimizer, nothing else changes the state
        of the model.
        """
        return []

    def router_state(self) -> dict[str, Tensor]:
        """Return the router's state for logging, such as thresholds and biases: (E,) each, 0 at
        first.
        """
        return {}

    def expert_mask(self, x: Tensor, ctx: Ctx) -> Tensor:
        """Return (B, T, E) bool: the experts selected for each token, none for padding."""
        raise NotImplementedError

    def inactive_parameters(self) -> int:
        """Return how many parameters a token does not use, on average."""
        return 0

"""The language model: embedding, blocks, norm, head.

    h = expand(embed(ids));  h = block(h) for every block;  logits = head(norm(collapse(h)))

Legend: B rows, T tokens, D width, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from tinsmith.core.errors import UserError
from tinsmith.nn.attention.rope import rotary_tables
from tinsmith.nn.attention.span import Span, attention_spans
from tinsmith.nn.config import Layer, ModelConfig
from tinsmith.nn.contract import BuildContext, Ctx, LayerCache, OptimizerReset, Out, Rotary, Routed
from tinsmith.nn.layers.linear import LMHead, init_weights
from tinsmith.nn.layers.norm import NORMS
from tinsmith.nn.layers.stable_topk import must_save_context_fn
from tinsmith.nn.parameters import freeze_except
from tinsmith.nn.precision import at_least_fp32

__all__ = ["LM", "Block", "ModelConfig", "ModelOut"]


class ModelOut(NamedTuple):
    """The output of `LM.forward`."""

    logits: Tensor | None
    """(B, T, V), at least float32; (B, 1, V) for logits="last"; None for logits=False."""
    losses: dict[str, Tensor]
    """Auxiliary losses by "layer.slot.name": scalars, already multiplied by their coefficients."""
    stats: dict[str, Tensor]
    grad_probes: dict[str, Tensor]
    hidden: Tensor
    """(B, T, D) after the final norm. `lm.head(hidden)` computes the logits of a chunk."""


class Block(nn.Module):
    """One layer: Residual(Mixer), then Residual(FeedForward), with pre-norms."""

    def __init__(self, config: ModelConfig, layer: Layer, build_ctx: BuildContext):
        super().__init__()
        norm = NORMS[config.norm]
        self.mix_norm = norm(config.dim, config.norm_eps)
        self.mixer = layer.mixer.build(build_ctx)
        self.mix_residual = config.residual.build(
            build_ctx._replace(sublayer_idx=2 * build_ctx.layer_idx)
        )
        self.feed_norm = norm(config.dim, config.norm_eps)
        self.feed = layer.feed_forward.build(build_ctx)
        self.feed_residual = config.residual.build(
            build_ctx._replace(sublayer_idx=2 * build_ctx.layer_idx + 1)
        )
        self.dropout = config.dropout.residual

    def forward(self, h: Tensor, ctx: Ctx, cache: LayerCache | None = None) -> Out:
        """Return the next residual state. Names of losses, stats and probes get the slot as
        prefix.
        """
        x, saved = self.mix_residual.read(h)
        mixer_out = self.mixer(self.mix_norm(x), ctx, cache)
        h = self.mix_residual.write(h, self._dropout(mixer_out.y), saved)

        x, saved = self.feed_residual.read(h)
        feed_out = self.feed(self.feed_norm(x), ctx)
        h = self.feed_residual.write(h, self._dropout(feed_out.y), saved)
        losses, stats, probes = (
            _prefixed("mixer", a) | _prefixed("feed", b)
            for a, b in zip(mixer_out[1:4], feed_out[1:4], strict=True)
        )
        return Out(h, losses, stats, probes, mixer_out.value_residual)

    def flops(self, seq_len: int) -> int:
        """Return the floating-point operations per token, as `Mixer.flops` does."""
        residuals = self.mix_residual.flops() + self.feed_residual.flops()
        return self.mixer.flops(seq_len) + self.feed.flops() + residuals

    def _dropout(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout, self.training) if self.dropout else y


class LM(nn.Module):
    """A causal language model (decoder-only transformer) with any mixers, feed-forwards and
    residuals.

    The model holds no state of a sequence. KV caches and recurrent states belong to the caller.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.places = (
            nn.Embedding(config.max_seq_len, config.dim) if config.positions == "learned" else None
        )
        blocks: list[Block] = []
        has_source = False  # of the value residual
        for index, layer in enumerate(config.layers):
            uses_it = layer.mixer.value_residual_shape(config.dim) is not None
            build_ctx = BuildContext(
                dim=config.dim,
                layer_idx=index,
                depth=config.depth,
                norm_eps=config.norm_eps,
                attention=config.attention,
                attention_dropout=config.dropout.attention,
                use_rope=config.positions == "rope",
                attention_scaling=config.rope.attention_scaling,
                is_value_residual_source=uses_it and not has_source,
            )
            blocks.append(Block(config, layer, build_ctx))
            has_source = has_source or uses_it
        self.blocks = cast(Sequence[Block], nn.ModuleList(blocks))
        self.norm = NORMS[config.norm](config.dim, config.norm_eps)
        self.head = LMHead(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        init_weights(self, config.depth)
        freeze_except(self, config.trainable)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        caches: list[LayerCache] | None = None,
        logits: bool | str = True,
    ) -> ModelOut:
        """Return the logits of token ids (B, T), or of probabilities over tokens (B, T, V).

        `positions` (B, T): by default counted from 0 in each document, or with caches from the
        row's `cache.lengths`; padding is not counted. `segments` (B, T): document ids >= 0, -1 for
        padding on either side, whose logits are finite and meaningless. `caches`: one per
        layer, updated in place; CacheFull if a row would exceed their capacity. `logits`: True,
        False or "last".
        """
        is_same_in_all_rows = positions is None and segments is None and caches is None
        is_too_long = caches is None and ids.shape[1] > self.config.max_seq_len
        if is_too_long and self.places is not None:
            limit = f"max_seq_len={self.config.max_seq_len}, learned positions"
            raise UserError(f"{ids.shape[1]} tokens in a row are beyond {limit}")
        spans = self._spans(ids, segments) if caches is None else {}
        if positions is None:
            positions = (
                _positions(ids, segments, spans[None])
                if caches is None
                else _cached_positions(ids, segments, caches[0].lengths)
            )
        h = self._embed(ids, positions)
        rotary = self._rotary(positions[:1] if is_same_in_all_rows else positions, h.dtype)
        ctx = Ctx(positions, segments, None, rotary, spans)
        if caches is None and any(block.mixer.needs_cu_seqlens for block in self.blocks):
            ctx = ctx._replace(packed=ctx.packed_documents())
        losses, stats, probes = {}, {}, {}
        h = self.config.residual.expand(h)
        for index, block in enumerate(self.blocks):
            out = self._block(block, h, ctx, None if caches is None else caches[index])
            h = out.y
            if ctx.value_residual is None and out.value_residual is not None:
                ctx = ctx._replace(value_residual=out.value_residual)
            losses |= _prefixed(index, out.losses)
            stats |= _prefixed(index, out.stats)
            probes |= _prefixed(index, out.grad_probes)
        hidden = self.norm(self.config.residual.collapse(h))
        return ModelOut(self._logits(hidden, logits), losses, stats, probes, hidden)

    def _block(self, block: Block, h: Tensor, ctx: Ctx, cache: LayerCache | None) -> Out:
        if (
            self.activation_checkpointing
            and self.training
            and cache is None
            and torch.is_grad_enabled()
        ):
            is_routed = isinstance(block.mixer, Routed) or isinstance(block.feed, Routed)
            context_fn = must_save_context_fn if is_routed else noop_context_fn
            return checkpoint(block, h, ctx, use_reentrant=False, context_fn=context_fn)  # type: ignore[return-value]
        return block(h, ctx, cache)

    def _spans(self, ids: Tensor, segments: Tensor | None) -> dict[int | None, Span]:
        """Return the attention spans of whole documents and of every window of the mixers."""
        windows = {None, *(block.mixer.window for block in self.blocks)}
        return attention_spans(segments, ids.shape[1], windows, ids.device)

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> dict[int, Rotary]:
        """Return the rotary tables of every width of the mixers."""
        dims = {block.mixer.rotary_dim for block in self.blocks}
        return {
            d: rotary_tables(self.config.rope, d, positions, dtype) for d in dims if d is not None
        }

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(ids) if ids.dim() == 2 else self._embed_soft(ids)
        if self.places is not None:
            x = x + self.places(positions)
        elif self.config.positions == "sinusoidal":
            x = x + _sinusoids(positions, self.config.dim, x.dtype)
        return F.dropout(x, self.config.dropout.embedding, self.training)

    def _embed_soft(self, probabilities: Tensor) -> Tensor:
        """Return the expected embeddings (B, T, D) of probabilities (B, T, V), without autocast,
        because looking up an id does not round either.
        """
        weight = self.embed.weight
        with torch.autocast(weight.device.type, enabled=False):
            return probabilities.to(weight.dtype) @ weight

    def _logits(self, hidden: Tensor, logits: bool | str) -> Tensor | None:
        if logits == "last":
            return self.head(hidden[:, -1:])
        return self.head(hidden) if logits else None

    def new_caches(
        self, batch_size: int, capacity: int, dtype: torch.dtype | None = None
    ) -> list[LayerCache]:
        """Return an empty cache per layer, for `batch_size` rows of up to `capacity` tokens.

        `capacity` is at most `max_seq_len`, because positions beyond it were never trained.
        """
        if not 1 <= capacity <= self.config.max_seq_len:
            limit = f"max_seq_len={self.config.max_seq_len}"
            raise UserError(f"capacity={capacity} tokens of a cache must be from 1 to {limit}")
        weight = self.embed.weight
        dtype = dtype or weight.dtype
        return [
            block.mixer.new_cache(batch_size, capacity, dtype, weight.device)
            for block in self.blocks
        ]

    def flops(self, seq_len: int) -> int:
        """Return the floating-point operations per token of a forward pass over `seq_len` tokens,
        including the head.
        """
        blocks = sum(block.flops(seq_len) for block in self.blocks)
        return blocks + 2 * self.config.dim * self.config.vocab_size

    def parameter_count(self) -> int:
        """Return the number of all parameters. Tied embeddings count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def active_parameter_count(self) -> int:
        """Return the number of parameters that a token uses: all but unselected experts."""
        return self.parameter_count() - sum(
            part.inactive_parameters() for part in self.routed_modules().values()
        )

    def after_backward(self, grad_probes: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return statistics that depend on gradients; routers that are trained by gradient probes
        add their gradients (`Routed.after_backward`).
        """
        return {
            f"{name}.{key}": value
            for name, part in self.routed_modules().items()
            for key, value in part.after_backward(_stripped(f"{name}.", grad_probes)).items()
        }

    def post_step(self, stats: dict[str, Tensor]) -> list[OptimizerReset]:
        """Update the routers after an optimizer step, with the statistics of the global batch
        (`Routed.post_step`). Return the rows whose optimizer state must be reset.
        """
        return [
            reset
            for name, part in self.routed_modules().items()
            for reset in part.post_step(_stripped(f"{name}.", stats))
        ]

    def routed_modules(self) -> dict[str, Routed]:
        """Return the mixers and feed-forwards with a router, by "layer.slot"."""
        parts = {
            f"{i}.{slot}": part
            for i, block in enumerate(self.blocks)
            for slot, part in (("mixer", block.mixer), ("feed", block.feed))
        }
        return {name: part for name, part in parts.items() if isinstance(part, Routed)}


def _positions(ids: Tensor, segments: Tensor | None, documents: Span) -> Tensor:
    """Return positions (B, T) that count from 0 in each document, and are 0 at padding."""
    if segments is None:
        return torch.arange(ids.shape[1], device=ids.device).expand(*ids.shape[:2])
    starts_BT, index_BT = documents.bounds
    return (index_BT - starts_BT).where(segments >= 0, 0)


def _cached_positions(ids: Tensor, segments: Tensor | None, lengths: Tensor) -> Tensor:
    """Return positions (B, T) that count from the cached length of each row, without padding."""
    if segments is None:
        return torch.arange(ids.shape[1], device=ids.device) + lengths[:, None]
    return ((segments >= 0).cumsum(1) - 1 + lengths[:, None]).clamp(min=0)


def _sinusoids(positions: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return sinusoidal position embeddings (B, T, D): sin in the first half, cos in the second,
    wavelengths 2 pi to 20000 pi (Vaswani et al., 1706.03762).
    """
    compute_dtype = at_least_fp32(dtype)
    exponents = torch.arange(0, dim, 2, dtype=compute_dtype, device=positions.device) / dim
    angles = positions.to(compute_dtype)[..., None] * 10000.0**-exponents
    return torch.cat((angles.sin(), angles.cos()), -1).to(dtype)


def _prefixed(prefix: str | int, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def _stripped(prefix: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }

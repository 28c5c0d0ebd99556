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
from tinsmith.nn.attention.core import document_starts
from tinsmith.nn.attention.rope import rotary_tables
from tinsmith.nn.config import Layer, ModelConfig
from tinsmith.nn.contract import BuildContext, Ctx, LayerCache, OptimizerReset, Out, Routed
from tinsmith.nn.layers.init import LMHead, init_weights
from tinsmith.nn.layers.norm import NORMS
from tinsmith.nn.layers.stable_topk import must_save_context_fn
from tinsmith.nn.parameters import freeze_except
from tinsmith.nn.precision import at_least_fp32

__all__ = ["LM", "Block", "ModelConfig", "ModelOut"]


class ModelOut(NamedTuple):
    """What the model returns."""

    logits: Tensor | None
    """(B, T, V), at least float32; (B, 1, V) for logits="last"; None for logits=False."""
    losses: dict[str, Tensor]
    """Scalars by "layer.slot.name", differentiable, already times their coefficients."""
    stats: dict[str, Tensor]
    grad_probes: dict[str, Tensor]
    hidden: Tensor
    """(B, T, D) after the final norm; `lm.head(hidden)` makes the logits of a chunk."""


class Block(nn.Module):
    """Residual(Mixer), then Residual(FeedForward)."""

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
        """Residual state in, residual state out; names get the slot in front."""
        x, kept = self.mix_residual.read(h)
        mixed = self.mixer(self.mix_norm(x), ctx, cache)
        h = self.mix_residual.write(h, self._drop(mixed.y), kept)

        x, kept = self.feed_residual.read(h)
        fed = self.feed(self.feed_norm(x), ctx)
        h = self.feed_residual.write(h, self._drop(fed.y), kept)
        output = (
            _prefixed("mixer", a) | _prefixed("feed", b)
            for a, b in zip(mixed[1:4], fed[1:4], strict=True)
        )
        losses, stats, probes = output
        return Out(h, losses, stats, probes, mixed.value_residual)

    def flops(self, seq_len: int) -> int:
        """Floating-point operations per token of a forward pass over `context` tokens."""
        streams = self.mix_residual.flops() + self.feed_residual.flops()
        return self.mixer.flops(seq_len) + self.feed.flops() + streams

    def _drop(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout, self.training) if self.dropout else y


class LM(nn.Module):
    """A causal language model of any parts. Stateless: what it remembers is in the caches it is
    given.
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
        offered = False
        for index, layer in enumerate(config.layers):
            offers = layer.mixer.value_residual_shape(config.dim) is not None
            build_ctx = BuildContext(
                dim=config.dim,
                layer_idx=index,
                depth=config.depth,
                norm_eps=config.norm_eps,
                attention=config.attention,
                attention_dropout=config.dropout.attention,
                use_rope=config.positions == "rope",
                attention_scaling=config.rope.attention_scaling,
                is_value_residual_source=offers and not offered,
            )
            blocks.append(Block(config, layer, build_ctx))
            offered = offered or offers
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
        """Ids (B, T), or probabilities (B, T, V), to logits.

        `positions` (B, T): by default counted from 0 inside each run of one segment; with caches,
        from that row's `cache.lengths`; padding is not counted. `segments` (B, T): document ids >=
        0, -1 is padding on either side, whose logits are finite and meaningless. `caches`: one per
        layer, updated in place; more tokens in a row than their capacity raise CacheFull. `logits`:
        True, False or "last".
        """
        shared = positions is None and segments is None and caches is None
        beyond = caches is None and ids.shape[1] > self.config.max_seq_len
        if beyond and self.places is not None:
            limit = f"max_seq_len={self.config.max_seq_len}, learned positions"
            raise UserError(f"{ids.shape[1]} tokens in a row are beyond {limit}")
        if positions is None:
            positions = _positions(ids, segments, None if caches is None else caches[0].lengths)
        h = self._embed(ids, positions)
        dims = {block.mixer.rotary_dim for block in self.blocks}
        reported = positions[:1] if shared else positions
        rotary = {
            d: rotary_tables(self.config.rope, d, reported, h.dtype) for d in dims if d is not None
        }
        ctx = Ctx(positions, segments, None, rotary)
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
            decides = isinstance(block.mixer, Routed) or isinstance(block.feed, Routed)
            keep = must_save_context_fn if decides else noop_context_fn
            return checkpoint(block, h, ctx, use_reentrant=False, context_fn=keep)  # type: ignore[return-value]
        return block(h, ctx, cache)

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(ids) if ids.dim() == 2 else self._mixture(ids)
        if self.places is not None:
            x = x + self.places(positions)
        elif self.config.positions == "sinusoidal":
            x = x + _sinusoids(positions, self.config.dim, x.dtype)
        return F.dropout(x, self.config.dropout.embedding, self.training)

    def _mixture(self, probabilities: Tensor) -> Tensor:
        """(B, T, V) -> (B, T, D), as precise as an id's row is under autocast."""
        weight = self.embed.weight
        with torch.autocast(weight.device.type, enabled=False):
            return probabilities.to(weight.dtype) @ weight

    def _logits(self, hidden: Tensor, wanted: bool | str) -> Tensor | None:
        if wanted == "last":
            return self.head(hidden[:, -1:])
        return self.head(hidden) if wanted else None

    def new_caches(
        self, batch_size: int, capacity: int, dtype: torch.dtype | None = None
    ) -> list[LayerCache]:
        """One empty cache per layer, for `rows` rows of up to `capacity` tokens, which is at most
        the model's context: what is decoded beyond it would be noise.
        """
        if not 1 <= capacity <= self.config.max_seq_len:
            limit = f"max_seq_len={self.config.max_seq_len}"
            raise UserError(f"capacity={capacity} tokens of a cache must be from 1 to {limit}")
        weight = self.embed.weight
        kind = dtype or weight.dtype
        return [
            block.mixer.new_cache(batch_size, capacity, kind, weight.device)
            for block in self.blocks
        ]

    def flops(self, seq_len: int) -> int:
        """Floating-point operations per token of a forward pass over `context` tokens, head
        included.
        """
        body = sum(block.flops(seq_len) for block in self.blocks)
        return body + 2 * self.config.dim * self.config.vocab_size

    def parameter_count(self) -> int:
        """All parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def active_parameter_count(self) -> int:
        """All parameters but those of the experts that a token does not choose."""
        return self.parameter_count() - sum(
            part.inactive_parameters() for part in self.routed_modules().values()
        )

    def after_backward(self, grad_probes: dict[str, Tensor]) -> dict[str, Tensor]:
        """Routers that learn from gradients add theirs; the statistics that only backward knows."""
        return {
            f"{name}.{key}": value
            for name, part in self.routed_modules().items()
            for key, value in part.after_backward(_stripped(f"{name}.", grad_probes)).items()
        }

    def post_step(self, stats: dict[str, Tensor]) -> list[OptimizerReset]:
        """After the optimizer's step, with the statistics of the global batch; what the
        optimizer is to forget.
        """
        return [
            reset
            for name, part in self.routed_modules().items()
            for reset in part.post_step(_stripped(f"{name}.", stats))
        ]

    def routed_modules(self) -> dict[str, Routed]:
        """Mixers and feed-forwards with a router, by "layer.slot"."""
        parts = {
            f"{i}.{slot}": part
            for i, block in enumerate(self.blocks)
            for slot, part in (("mixer", block.mixer), ("feed", block.feed))
        }
        return {name: part for name, part in parts.items() if isinstance(part, Routed)}


def _positions(ids: Tensor, segments: Tensor | None, lengths: Tensor | None) -> Tensor:
    """(B, T) positions as `LM.forward` documents them."""
    rows, count = ids.shape[:2]
    index = torch.arange(count, device=ids.device).expand(rows, count)
    if segments is None:
        return index if lengths is None else index + lengths[:, None]
    real = segments >= 0
    if lengths is None:
        return (index - document_starts(segments)).where(real, 0)
    return (real.cumsum(1) - 1 + lengths[:, None]).clamp(min=0)


def _sinusoids(positions: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """(B, T, D): sin in the first half, cos in the second, wavelengths 2 pi to 20000 pi (Vaswani
    et al., 1706.03762).
    """
    kind = at_least_fp32(dtype)
    rates = 10000.0 ** (-torch.arange(0, dim, 2, dtype=kind, device=positions.device) / dim)
    angles = positions.to(kind)[..., None] * rates
    return torch.cat((angles.sin(), angles.cos()), -1).to(dtype)


def _prefixed(prefix: str | int, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def _stripped(prefix: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }

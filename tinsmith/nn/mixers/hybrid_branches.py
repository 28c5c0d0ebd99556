"""The three branches of Tiny-R2's hybrid attention. All use latent queries.

- compress: attends to blocks of `compress_block` tokens. The latent and the shared key of
  `attention.latent` are pooled per channel: sum_j softmax_j(W c_j + B_j) c_j. The pooled key is
  rotated to the position of the block's last token. A query sees a block once that token is
  visible; without a visible block the output is 0. With blocks of one token this is plain latent
  attention.
- select: has its own keys and values. Each query attends to `index_topk` tokens, the same for all
  heads, which `attention.indexer` selects. The indexer is trained by its own loss.
- window: has its own keys and values. Each query attends to the last `window` tokens, itself
  included.

Legend: B rows, T tokens, S keys, H heads, D head width, N un-turned part of it, R turned part, C
latent, V values, M blocks, E blocks that end, L tokens of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tinsmith.core.parse import Size
from tinsmith.nn.attention.cache import KVCache, RotatingKVCache
from tinsmith.nn.attention.compress import (
    BlockCache,
    BlockLayout,
    BlockPositions,
    attend_compressed,
)
from tinsmith.nn.attention.core import attend
from tinsmith.nn.attention.indexer import IndexedHeads
from tinsmith.nn.attention.rope import apply_rotary_emb
from tinsmith.nn.attention.span import Span
from tinsmith.nn.attention.token_sparse import TokenSparseConfig, attend_topk_tokens
from tinsmith.nn.contract import BuildContext, Ctx, Rotary
from tinsmith.nn.precision import at_least_fp32

BranchName = Literal["compress", "select", "window"]


@dataclass(frozen=True, kw_only=True)
class BranchedHeads(IndexedHeads):
    """Sizes of all branches; the defaults are Tiny-R2's."""

    index_topk: Size = 128
    compress_block: Size = 16
    window: Size = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("compress_block", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def block_layout(self) -> BlockLayout:
        """How tokens are compressed."""
        return BlockLayout(self.compress_block, self.compress_block)


class BranchInputs(NamedTuple):
    """What every branch may read."""

    x: Tensor
    nope_BTHN: Tensor
    rope_BTHR: Tensor
    """Rotated query part, (B, T, H, rope_dim)."""
    query_input: Tensor
    """What queries are made of."""
    rotary: Rotary | None
    ctx: Ctx
    span: Span
    """All earlier tokens of the document, in order of places."""
    block_positions: BlockPositions
    dropout: float

    @property
    def q_BTHD(self) -> Tensor:
        """The whole queries."""
        return torch.cat((self.nope_BTHN, self.rope_BTHR), -1)


class AttentionBranch(nn.Module):
    """One way to look back."""

    def forward(self, inputs: BranchInputs, cache: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, T, H, V), and losses."""
        raise NotImplementedError

    def new_cache(
        self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> BlockCache | KVCache:
        """What it remembers."""
        raise NotImplementedError

    def flops(self, seq_len: int) -> float:
        """Beyond its linear layers, per token."""
        raise NotImplementedError


class CompressBranch(AttentionBranch):
    """Latent attention to pooled blocks."""

    def __init__(self, config: BranchedHeads, build_ctx: BuildContext):
        super().__init__()
        self.config, self.kind = config, build_ctx.attention
        self.keys = config.build_keys(build_ctx.dim)
        alone = config.compress_block == 1
        pools = ((config.compress_block, width) for width in (config.kv_rank, config.rope_dim))
        self.pool_latent, self.pool_key = (
            IdentityPool() if alone else SoftmaxPool(*pool) for pool in pools
        )

    def forward(
        self, inputs: BranchInputs, cache: BlockCache | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, T, H, V), 0 where no block is seen."""
        new = self.keys(inputs.x, None)
        if cache is None:
            latent_BMC, rope_BMR = self._cut(inputs, *new)
        else:
            latent_BMC, rope_BMR = self._kept(inputs, cache, *new)
        few = cache is not None and self.config.prefer_absorbed(inputs.x.shape[1])
        return (self._absorbed if few else self._expanded)(inputs, latent_BMC, rope_BMR), {}

    def _cut(
        self, requested: BranchInputs, latent_BTC: Tensor, rope_BTR: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The blocks of the tokens of one call."""

        def cut(tensor: Tensor) -> Tensor:
            return self.config.block_layout.gather_blocks(tensor, requested.span)

        rope_BMR = self.pool_key(cut(rope_BTR))
        if requested.rotary is not None:
            tables = (table.expand(len(rope_BTR), -1, -1) for table in requested.rotary)
            cos, sin = (cut(table)[:, :, -1] for table in tables)
            rope_BMR = apply_rotary_emb(rope_BMR[:, :, None], (cos, sin))[:, :, 0]
        return self.pool_latent(cut(latent_BTC)), rope_BMR

    def _kept(
        self, requested: BranchInputs, cache: BlockCache, latent_BTC: Tensor, rope_BTR: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All blocks so far, those that end in this call taken in."""
        ended = cache.append(
            requested.ctx.segments, requested.block_positions, latent_BTC, rope_BTR
        )
        latent_ELC, rope_ELR = (tokens.to(requested.x.dtype) for tokens in ended.tokens)
        rope_ER = self.pool_key(rope_ELR)
        if requested.rotary is not None:
            tables = (table.expand(len(rope_BTR), -1, -1) for table in requested.rotary)
            cos, sin = (table[ended.row_E, ended.column_E][:, None] for table in tables)
            rope_ER = apply_rotary_emb(rope_ER[:, None, None], (cos, sin))[:, 0, 0]
        kept = cache.append_blocks(ended, self.pool_latent(latent_ELC), rope_ER)
        latent_BMC, rope_BMR = (tensor.to(requested.x.dtype) for tensor in kept)
        return latent_BMC, rope_BMR

    def _expanded(self, requested: BranchInputs, latent_BMC: Tensor, rope_BMR: Tensor) -> Tensor:
        k_BMHD, v_BMHV = self.keys.expand(latent_BMC, rope_BMR)
        return self._attend(requested.q_BTHD, k_BMHD, v_BMHV, requested)

    def _absorbed(self, requested: BranchInputs, latent_BMC: Tensor, rope_BMR: Tensor) -> Tensor:
        q_BTHD = self.keys.absorb_queries(requested.nope_BTHN, requested.rope_BTHR)
        k_BM1D = torch.cat((latent_BMC, rope_BMR), -1)[:, :, None]
        return self.keys.project_values(
            self._attend(q_BTHD, k_BM1D, latent_BMC[:, :, None], requested)
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, requested: BranchInputs) -> Tensor:
        blocks, dropout = self.config.block_layout, requested.dropout
        return attend_compressed(
            q, k, v, blocks, requested.block_positions, kind=self.kind, dropout=dropout
        )

    def new_cache(
        self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> BlockCache:
        """Per block, and for each of the newest `compress_block` tokens, kv_rank + rope_dim."""
        shapes: list[tuple[int, ...]] = [(self.config.kv_rank,), (self.config.rope_dim,)]
        return BlockCache(
            self.config.block_layout, batch_size, capacity, shapes, shapes, dtype, device
        )

    def flops(self, seq_len: int) -> float:
        """Scores and sums, of half of the blocks on average."""
        return self.config.pair_flops * (seq_len + 1) / 2 / self.config.compress_block


class SoftmaxPool(nn.Module):
    """sum_j softmax_j(W c_j + B_j) c_j over the tokens j of a block, channel by channel."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.score = nn.Linear(width, width, bias=False)
        self.places = nn.Parameter(torch.zeros(size, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., L, C) -> (..., C)."""
        scores = (self.score(tokens) + self.places).to(at_least_fp32(tokens.dtype))
        return (scores.softmax(-2) * tokens).sum(-2).to(tokens.dtype)


class IdentityPool(nn.Module):
    """The pool of blocks of one token."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., 1, C) -> (..., C)."""
        return tokens[..., 0, :]


class DirectKeyValues(nn.Module):
    """Keys and values of every head, straight from x; the last R numbers of keys are turned."""

    def __init__(self, config: BranchedHeads, dim: int):
        super().__init__()
        self.heads, self.widths = config.heads, (config.nope_dim, config.rope_dim)
        self.k = nn.Linear(dim, config.heads * sum(self.widths), bias=False)
        self.v = nn.Linear(dim, config.heads * config.v_dim, bias=False)
        self.shapes: list[tuple[int, ...]] = [
            (config.heads, sum(self.widths)),
            (config.heads, config.v_dim),
        ]

    def forward(self, inputs: BranchInputs) -> tuple[Tensor, Tensor]:
        """(B, T, H, N + R) and (B, T, H, V)."""
        k_BTHD = self.k(inputs.x).unflatten(-1, (self.heads, -1))
        v_BTHV = self.v(inputs.x).unflatten(-1, (self.heads, -1))
        if inputs.rotary is None:
            return k_BTHD, v_BTHV
        nope_BTHN, rope_BTHR = k_BTHD.split(self.widths, -1)
        return torch.cat((nope_BTHN, apply_rotary_emb(rope_BTHR, inputs.rotary)), -1), v_BTHV


class SelectBranch(AttentionBranch):
    """Attention to the tokens that an indexer chooses."""

    def __init__(self, config: BranchedHeads, build_ctx: BuildContext):
        super().__init__()
        self.config, self.kind = config, build_ctx.attention
        self.keys = DirectKeyValues(config, build_ctx.dim)
        self.indexer = config.build_indexer(build_ctx.dim)

    def forward(
        self, inputs: BranchInputs, cache: KVCache | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, T, H, V), and in training the indexer's loss."""
        (k_BSHD, v_BSHV), seen = self.keys(inputs), inputs.span
        index = self.indexer(inputs.x, inputs.query_input, inputs.rotary)
        if cache is not None:
            held, seen = cache.append(inputs.ctx.segments, k_BSHD, v_BSHV, index.k_BSE)
            k_BSHD, v_BSHV, k_BSE = (tensor.to(inputs.x.dtype) for tensor in held)
            index = index._replace(k_BSE=k_BSE)
        learns = self.config.index_target if self.training else None
        choice = TokenSparseConfig(self.config.index_topk, learns, self.kind, inputs.dropout)
        q_BTHD, segments = inputs.q_BTHD, inputs.ctx.segments
        y_BTHV, lost = attend_topk_tokens(q_BTHD, k_BSHD, v_BSHV, index, seen, segments, choice)
        return y_BTHV, {} if lost is None else {"indexer": self.config.index_weight * lost}

    def new_cache(
        self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Per token, keys and values of every head, and an index key."""
        shapes = [*self.keys.shapes, (self.config.index_dim,)]
        return KVCache(batch_size, capacity, shapes, dtype, device)

    def flops(self, seq_len: int) -> float:
        """Index scores of all earlier tokens, attention to the chosen ones."""
        indexed = self.config.index_heads * self.config.index_dim * (seq_len + 1)
        return indexed + self.config.pair_flops * _last(self.config.index_topk, seq_len)


class WindowBranch(AttentionBranch):
    """Attention to the last `window` tokens."""

    def __init__(self, config: BranchedHeads, build_ctx: BuildContext):
        super().__init__()
        self.config, self.kind = config, build_ctx.attention
        self.keys = DirectKeyValues(config, build_ctx.dim)

    def forward(
        self, inputs: BranchInputs, cache: RotatingKVCache | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, T, H, V)."""
        (k_BSHD, v_BSHV), segments = self.keys(inputs), inputs.ctx.segments
        if cache is None:
            seen = inputs.ctx.span(self.config.window)
        else:
            (k_BSHD, v_BSHV), seen = cache.append(segments, k_BSHD, v_BSHV)
        q_BTHD, dropout = inputs.q_BTHD, inputs.dropout
        return attend(q_BTHD, k_BSHD, v_BSHV, seen, kind=self.kind, dropout=dropout), {}

    def new_cache(
        self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> RotatingKVCache:
        """Keys and values of every head, of the last `window` tokens."""
        return RotatingKVCache(
            batch_size, capacity, self.config.window, self.keys.shapes, dtype, device
        )

    def flops(self, seq_len: int) -> float:
        """Scores and sums over a window."""
        return self.config.pair_flops * _last(self.config.window, seq_len)


def _last(count: int, context: int) -> float:
    """How many of the last `count` tokens there are on average."""
    count = min(count, context)
    return count - count * (count - 1) / (2 * context)


BRANCHES: dict[str, Callable[[BranchedHeads, BuildContext], AttentionBranch]] = {
    "compress": CompressBranch,
    "select": SelectBranch,
    "window": WindowBranch,
}

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

Legend: B rows, T tokens, S keys, H heads, D head width, N unrotated part of it, R rotated part, C
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
        """The layout of compressed blocks."""
        return BlockLayout(self.compress_block, self.compress_block)


class BranchInputs(NamedTuple):
    """The inputs of every branch."""

    x: Tensor
    nope_BTHN: Tensor
    rope_BTHR: Tensor
    """Rotated query part, (B, T, H, rope_dim)."""
    query_input: Tensor
    """The input of the query projection."""
    rotary: Rotary | None
    ctx: Ctx
    span: Span
    """All earlier tokens of the document, in order of position."""
    block_positions: BlockPositions
    dropout: float

    @property
    def q_BTHD(self) -> Tensor:
        """The complete queries, unrotated and rotated part."""
        return torch.cat((self.nope_BTHN, self.rope_BTHR), -1)


class AttentionBranch(nn.Module):
    """Base class of the branches."""

    def forward(self, inputs: BranchInputs, cache: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output (B, T, H, V) and losses."""
        raise NotImplementedError

    def new_cache(
        self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> BlockCache | KVCache:
        """Create the cache of the branch."""
        raise NotImplementedError

    def flops(self, seq_len: int) -> float:
        """Count FLOPs per token, without linear layers."""
        raise NotImplementedError


class CompressBranch(AttentionBranch):
    """Latent attention to compressed blocks, which are pooled tokens."""

    def __init__(self, config: BranchedHeads, build_ctx: BuildContext):
        super().__init__()
        self.config, self.kind = config, build_ctx.attention
        self.keys = config.build_keys(build_ctx.dim)
        single_token = config.compress_block == 1
        pools = ((config.compress_block, width) for width in (config.kv_rank, config.rope_dim))
        self.pool_latent, self.pool_key = (
            IdentityPool() if single_token else SoftmaxPool(*pool) for pool in pools
        )

    def forward(
        self, inputs: BranchInputs, cache: BlockCache | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output (B, T, H, V), 0 for a query without visible blocks."""
        new = self.keys(inputs.x, None)
        if cache is None:
            latent_BMC, rope_BMR = self._compress(inputs, *new)
        else:
            latent_BMC, rope_BMR = self._compress_cached(inputs, cache, *new)
        absorb = cache is not None and self.config.prefer_absorbed(inputs.x.shape[1])
        return (self._absorbed if absorb else self._expanded)(inputs, latent_BMC, rope_BMR), {}

    def _compress(
        self, inputs: BranchInputs, latent_BTC: Tensor, rope_BTR: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compress the tokens of one call to blocks."""

        def gather(tensor: Tensor) -> Tensor:
            return self.config.block_layout.gather_blocks(tensor, inputs.span)

        rope_BMR = self.pool_key(gather(rope_BTR))
        if inputs.rotary is not None:
            tables = (table.expand(len(rope_BTR), -1, -1) for table in inputs.rotary)
            cos, sin = (gather(table)[:, :, -1] for table in tables)
            rope_BMR = apply_rotary_emb(rope_BMR[:, :, None], (cos, sin))[:, :, 0]
        return self.pool_latent(gather(latent_BTC)), rope_BMR

    def _compress_cached(
        self, inputs: BranchInputs, cache: BlockCache, latent_BTC: Tensor, rope_BTR: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Append the tokens of a call to the cache and return all blocks so far."""
        ended = cache.append(inputs.ctx.segments, inputs.block_positions, latent_BTC, rope_BTR)
        latent_ELC, rope_ELR = (tokens.to(inputs.x.dtype) for tokens in ended.tokens)
        rope_ER = self.pool_key(rope_ELR)
        if inputs.rotary is not None:
            tables = (table.expand(len(rope_BTR), -1, -1) for table in inputs.rotary)
            cos, sin = (table[ended.row_E, ended.column_E][:, None] for table in tables)
            rope_ER = apply_rotary_emb(rope_ER[:, None, None], (cos, sin))[:, 0, 0]
        blocks = cache.append_blocks(ended, self.pool_latent(latent_ELC), rope_ER)
        latent_BMC, rope_BMR = (tensor.to(inputs.x.dtype) for tensor in blocks)
        return latent_BMC, rope_BMR

    def _expanded(self, inputs: BranchInputs, latent_BMC: Tensor, rope_BMR: Tensor) -> Tensor:
        k_BMHD, v_BMHV = self.keys.expand(latent_BMC, rope_BMR)
        return self._attend(inputs.q_BTHD, k_BMHD, v_BMHV, inputs)

    def _absorbed(self, inputs: BranchInputs, latent_BMC: Tensor, rope_BMR: Tensor) -> Tensor:
        q_BTHD = self.keys.absorb_queries(inputs.nope_BTHN, inputs.rope_BTHR)
        k_BM1D = torch.cat((latent_BMC, rope_BMR), -1)[:, :, None]
        return self.keys.project_values(
            self._attend(q_BTHD, k_BM1D, latent_BMC[:, :, None], inputs)
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: BranchInputs) -> Tensor:
        blocks, dropout = self.config.block_layout, inputs.dropout
        return attend_compressed(
            q, k, v, blocks, inputs.block_positions, kind=self.kind, dropout=dropout
        )

    def new_cache(
        self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> BlockCache:
        """Create a cache of kv_rank + rope_dim numbers per block and per token of the newest block.

        The newest block has `compress_block` tokens.
        """
        shapes: list[tuple[int, ...]] = [(self.config.kv_rank,), (self.config.rope_dim,)]
        return BlockCache(
            self.config.block_layout, batch_size, capacity, shapes, shapes, dtype, device
        )

    def flops(self, seq_len: int) -> float:
        """Count scores and sums over half of the blocks, which is the mean."""
        return self.config.pair_flops * (seq_len + 1) / 2 / self.config.compress_block


class SoftmaxPool(nn.Module):
    """Pool the tokens j of a block per channel: sum_j softmax_j(W c_j + B_j) c_j."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.score = nn.Linear(width, width, bias=False)
        self.places = nn.Parameter(torch.zeros(size, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (..., L, C) to (..., C)."""
        scores = (self.score(tokens) + self.places).to(at_least_fp32(tokens.dtype))
        return (scores.softmax(-2) * tokens).sum(-2).to(tokens.dtype)


class IdentityPool(nn.Module):
    """The pool for blocks of one token."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (..., 1, C) to (..., C)."""
        return tokens[..., 0, :]


class DirectKeyValues(nn.Module):
    """Keys and values of every head, projected from x; the last R channels of keys are rotated."""

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
        """Return keys (B, T, H, N + R) and values (B, T, H, V)."""
        k_BTHD = self.k(inputs.x).unflatten(-1, (self.heads, -1))
        v_BTHV = self.v(inputs.x).unflatten(-1, (self.heads, -1))
        if inputs.rotary is None:
            return k_BTHD, v_BTHV
        nope_BTHN, rope_BTHR = k_BTHD.split(self.widths, -1)
        return torch.cat((nope_BTHN, apply_rotary_emb(rope_BTHR, inputs.rotary)), -1), v_BTHV


class SelectBranch(AttentionBranch):
    """Attention to the tokens that an indexer selects."""

    def __init__(self, config: BranchedHeads, build_ctx: BuildContext):
        super().__init__()
        self.config, self.kind = config, build_ctx.attention
        self.keys = DirectKeyValues(config, build_ctx.dim)
        self.indexer = config.build_indexer(build_ctx.dim)

    def forward(
        self, inputs: BranchInputs, cache: KVCache | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output (B, T, H, V), and in training the indexer's loss."""
        (k_BSHD, v_BSHV), span = self.keys(inputs), inputs.span
        index = self.indexer(inputs.x, inputs.query_input, inputs.rotary)
        if cache is not None:
            cached, span = cache.append(inputs.ctx.segments, k_BSHD, v_BSHV, index.k_BSE)
            k_BSHD, v_BSHV, k_BSE = (tensor.to(inputs.x.dtype) for tensor in cached)
            index = index._replace(k_BSE=k_BSE)
        index_target = self.config.index_target if self.training else None
        config = TokenSparseConfig(self.config.index_topk, index_target, self.kind, inputs.dropout)
        q_BTHD, segments = inputs.q_BTHD, inputs.ctx.segments
        y_BTHV, index_loss = attend_topk_tokens(
            q_BTHD, k_BSHD, v_BSHV, index, span, segments, config
        )
        return y_BTHV, {} if index_loss is None else {
            "indexer": self.config.index_weight * index_loss
        }

    def new_cache(
        self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Create a cache of keys and values of every head and an index key per token."""
        shapes = [*self.keys.shapes, (self.config.index_dim,)]
        return KVCache(batch_size, capacity, shapes, dtype, device)

    def flops(self, seq_len: int) -> float:
        """Count index scores of all earlier tokens and attention to the selected ones."""
        index_flops = self.config.index_heads * self.config.index_dim * (seq_len + 1)
        return index_flops + self.config.pair_flops * _mean_visible(self.config.index_topk, seq_len)


class WindowBranch(AttentionBranch):
    """Attention to the last `window` tokens."""

    def __init__(self, config: BranchedHeads, build_ctx: BuildContext):
        super().__init__()
        self.config, self.kind = config, build_ctx.attention
        self.keys = DirectKeyValues(config, build_ctx.dim)

    def forward(
        self, inputs: BranchInputs, cache: RotatingKVCache | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output (B, T, H, V)."""
        (k_BSHD, v_BSHV), segments = self.keys(inputs), inputs.ctx.segments
        if cache is None:
            span = inputs.ctx.span(self.config.window)
        else:
            (k_BSHD, v_BSHV), span = cache.append(segments, k_BSHD, v_BSHV)
        q_BTHD, dropout = inputs.q_BTHD, inputs.dropout
        return attend(q_BTHD, k_BSHD, v_BSHV, span, kind=self.kind, dropout=dropout), {}

    def new_cache(
        self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> RotatingKVCache:
        """Create a cache of keys and values of every head, for the last `window` tokens."""
        return RotatingKVCache(
            batch_size, capacity, self.config.window, self.keys.shapes, dtype, device
        )

    def flops(self, seq_len: int) -> float:
        """Count scores and sums over a window."""
        return self.config.pair_flops * _mean_visible(self.config.window, seq_len)


def _mean_visible(count: int, context: int) -> float:
    """Return the mean number of visible tokens if a query sees at most the last `count` ones."""
    count = min(count, context)
    return count - count * (count - 1) / (2 * context)


BRANCHES: dict[str, Callable[[BranchedHeads, BuildContext], AttentionBranch]] = {
    "compress": CompressBranch,
    "select": SelectBranch,
    "window": WindowBranch,
}

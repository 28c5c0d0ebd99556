"""Native Sparse Attention (Yuan et al., 2502.11089): three attention branches, mixed by gates.

    y_t = O sum_b g_t^b attention(q_t, K_t^b, V_t^b)      g_t^b = sigmoid(W_b x_t), per head

- compress: keys and values of blocks of `compress_block` tokens, one block every `compress_stride`,
  each pooled by an MLP over its concatenated tokens plus learned positions within the block. A
  query sees a block once the block's last token is visible; without visible blocks the output is 0.
- select: the raw tokens of the `select_count` blocks of `select_block` tokens to which the compress
  branch attends most (`attention.block_scores`); the heads of a group select together. The query's
  own block, the first and the previous one are always among them, so `select_count` of 4 or more
  leaves blocks to select.
- window: the last `window` tokens, the query's own included.

Each branch has its own keys and values; queries are shared. Blocks are counted from the first token
of each document. The paper does not specify positions in the compress branch: here its keys are
pooled, and its queries used, before RoPE. Gates are one linear layer; the paper has an MLP. The
window branch has the value residual (2410.17897).

Legend: B rows, T tokens, S keys, H query heads, G key and value heads, D head width, N compressed
blocks, L tokens of a block, C selected blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.core.parse import Size
from tinsmith.nn.attention.block_scores import select_blocks
from tinsmith.nn.attention.block_sparse import attend_topk_blocks
from tinsmith.nn.attention.cache import KVCache, RotatingKVCache
from tinsmith.nn.attention.compress import (
    BlockCache,
    BlockLayout,
    BlockPositions,
    attend_compressed,
    block_positions,
)
from tinsmith.nn.attention.core import BranchGate, GroupedHeads, attend
from tinsmith.nn.attention.rope import apply_rotary_emb
from tinsmith.nn.attention.span import Span
from tinsmith.nn.contract import BuildContext, Ctx, LayerCache, Mixer, Out, truncate_caches
from tinsmith.nn.layers.linear import ResidualProj
from tinsmith.nn.layers.norm import RMSNorm
from tinsmith.nn.precision import at_least_fp32

KeyValue = tuple[Tensor, Tensor]
"""A pair of keys and values."""


@dataclass(frozen=True, kw_only=True)
class NSA(GroupedHeads):
    """Native sparse attention: compressed blocks, selected blocks and a window."""

    kind: Literal["nsa"] = "nsa"
    heads: Size = 8
    kv_heads: Size | None = 2  # null: = heads
    head_dim: Size | None = None  # = dim // heads
    compress_block: Size = 32
    compress_stride: Size = 16
    compress_hidden: Size | None = None  # of the pooling MLP, = 2 head_dim
    select_block: Size = 64
    select_count: Size = (
        16  # own, first and previous block always, in this order; the others by score
    )
    window: Size = 512
    qk_norm: bool = False
    value_residual: bool = False
    rope: bool = True

    def __post_init__(self) -> None:
        for name in (
            *("heads", "kv_heads", "head_dim", "compress_block", "compress_stride"),
            *("compress_hidden", "select_block", "select_count", "window"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.heads % self.num_kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        for name in ("compress_block", "select_block"):
            if getattr(self, name) % self.compress_stride:
                stride = f"compress_stride={self.compress_stride}"
                raise ValueError(f"{name}={getattr(self, name)} must be a multiple of {stride}")
        if self.compress_block > self.select_block:
            blocks = f"select_block={self.select_block}"
            raise ValueError(f"compress_block={self.compress_block} must be at most {blocks}")

    @property
    def block_layout(self) -> BlockLayout:
        """The layout of compressed blocks."""
        return BlockLayout(self.compress_block, self.compress_stride)

    def build(self, build_ctx: BuildContext) -> "NSAMixer":
        """Build the module."""
        return NSAMixer(self, build_ctx)


class MLPPool(nn.Module):
    """The paper's phi: an MLP over the concatenated tokens of a block and their positions."""

    def __init__(self, size: int, width: int, hidden: int):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(size, width))
        self.inner = nn.Linear(size * width, hidden)
        # A bias would add the same vector to every key, which softmax ignores.
        self.outer = nn.Linear(hidden, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (..., L, G, D) to (..., G, D)."""
        with_positions = tokens.transpose(-3, -2) + self.positions
        return self.outer(F.gelu(self.inner(with_positions.flatten(-2))))


class NSAMixer(Mixer):
    """The module of `NSA`."""

    def __init__(self, config: NSA, build_ctx: BuildContext):
        super().__init__()
        self.config, self.dim, self.head_dim = (
            config,
            build_ctx.dim,
            config.resolve_head_dim(build_ctx.dim),
        )
        self.attention, self.dropout = build_ctx.attention, build_ctx.attention_dropout
        self.rotary_dim = self.head_dim if config.rope and build_ctx.use_rope else None
        self.window = config.window
        query_dim, kv_dim = config.heads * self.head_dim, config.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(build_ctx.dim, query_dim, bias=False)
        self.compress_k = nn.Linear(build_ctx.dim, kv_dim, bias=False)
        self.compress_v = nn.Linear(build_ctx.dim, kv_dim, bias=False)
        self.select_k = nn.Linear(build_ctx.dim, kv_dim, bias=False)
        self.select_v = nn.Linear(build_ctx.dim, kv_dim, bias=False)
        self.window_k = nn.Linear(build_ctx.dim, kv_dim, bias=False)
        self.window_v = nn.Linear(build_ctx.dim, kv_dim, bias=False)
        hidden = config.compress_hidden or 2 * self.head_dim
        self.pool_k = MLPPool(config.compress_block, self.head_dim, hidden)
        self.pool_v = MLPPool(config.compress_block, self.head_dim, hidden)
        self.branch_gate = BranchGate(build_ctx.dim, 3 * config.heads)
        self.o_proj = ResidualProj(query_dim, build_ctx.dim, bias=False)
        norms = [
            RMSNorm(self.head_dim, build_ctx.norm_eps) for _ in range(4 if config.qk_norm else 0)
        ]
        identities = [nn.Identity() for _ in range(4 - len(norms))]
        self.q_norm, self.compress_norm, self.select_norm, self.window_norm = norms + identities
        mixes_values = config.value_residual and not build_ctx.is_value_residual_source
        self.value_mix = nn.Parameter(torch.full((2,), 0.5)) if mixes_values else None

    def forward(self, x: Tensor, ctx: Ctx, cache: Any = None) -> Out:
        """Map x (B, T, D) to Out.y (B, T, D)."""
        q_BTHD = self.q_norm(self._heads(self.q_proj, x))
        compress_kv = (
            self.compress_norm(self._heads(self.compress_k, x)),
            self._heads(self.compress_v, x),
        )
        select_k_BTGD = self.select_norm(self._heads(self.select_k, x))
        window_k_BTGD = self.window_norm(self._heads(self.window_k, x))
        window_v_BTGD = value_residual = self._heads(self.window_v, x)
        rotated_BTHD = q_BTHD
        if self.rotary_dim:
            rotary = ctx.rotary[self.rotary_dim]
            rotated_BTHD, select_k_BTGD = (
                apply_rotary_emb(q_BTHD, rotary),
                apply_rotary_emb(select_k_BTGD, rotary),
            )
            window_k_BTGD = apply_rotary_emb(window_k_BTGD, rotary)
        if self.value_mix is not None and ctx.value_residual is not None:
            mixed = self.value_mix[0] * ctx.value_residual + self.value_mix[1] * window_v_BTGD
            window_v_BTGD = mixed.to(window_v_BTGD.dtype)
        select_kv, window_kv = (
            (select_k_BTGD, self._heads(self.select_v, x)),
            (window_k_BTGD, window_v_BTGD),
        )
        if cache is None:
            kv = self._key_values(ctx, compress_kv, select_kv, window_kv)
        else:
            kv = cache.append(ctx.segments, self._pool, compress_kv, select_kv, window_kv)
        y_BTHD = self._gate(x, self._branches(q_BTHD, rotated_BTHD, kv))
        value_out = value_residual if self.config.value_residual else None
        return Out(self.o_proj(y_BTHD.flatten(2)), value_residual=value_out)

    def _heads(self, linear: nn.Linear, x: Tensor) -> Tensor:
        return linear(x).unflatten(-1, (-1, self.head_dim))

    def _pool(self, k: Tensor, v: Tensor) -> KeyValue:
        """Pool tokens of blocks (..., L, G, D) to (..., G, D), keys and values."""
        return self.pool_k(k), self.pool_v(v)

    def _key_values(
        self,
        ctx: Ctx,
        compress_kv: KeyValue,
        select_kv: KeyValue,
        window_kv: KeyValue,
    ) -> "NSAKeyValues":
        """Return the keys and values of all branches of one call without a cache."""
        length, device = window_kv[0].shape[1], window_kv[0].device
        span = ctx.span()
        gather = self.config.block_layout.gather_blocks
        pooled = self._pool(gather(compress_kv[0], span), gather(compress_kv[1], span))
        window_span = ctx.span(self.config.window)
        return NSAKeyValues(
            block_positions(span, length, length, device),
            span,
            pooled,
            select_kv,
            window_kv,
            window_span,
        )

    def _branches(self, q_BTHD: Tensor, rotated_BTHD: Tensor, kv: "NSAKeyValues") -> list[Tensor]:
        """Return the output of each branch, (B, T, H, D) each."""
        kind, dropout = self.attention, self.dropout if self.training else 0.0
        layout, positions = self.config.block_layout, kv.block_positions
        return [
            attend_compressed(
                q_BTHD, *kv.compress_kv, layout, positions, kind=kind, dropout=dropout
            ),
            self._select_branch(q_BTHD, rotated_BTHD, kv, kind, dropout),
            attend(rotated_BTHD, *kv.window_kv, kv.window_span, kind=kind, dropout=dropout),
        ]

    def _select_branch(
        self, q_BTHD: Tensor, rotated_BTHD: Tensor, kv: "NSAKeyValues", kind: str, dropout: float
    ) -> Tensor:
        """Attend to the selected blocks; if there are at most `select_count` blocks, to all of
        them.
        """
        keys, size, count = (
            kv.select_kv[0].shape[1],
            self.config.select_block,
            self.config.select_count,
        )
        if keys <= count * size:
            return attend(rotated_BTHD, *kv.select_kv, kv.span, kind=kind, dropout=dropout)
        k_BNGD, layout, positions = kv.compress_kv[0], self.config.block_layout, kv.block_positions
        starts = select_blocks(q_BTHD, k_BNGD, layout, positions, keys=keys, size=size, count=count)
        arguments = (rotated_BTHD, *kv.select_kv, starts, positions.cache_position_BT, size)
        return attend_topk_blocks(*arguments, kind=kind, dropout=dropout)

    def _gate(self, x: Tensor, branches: list[Tensor]) -> Tensor:
        """Return the sum of the branches, each multiplied by its gate."""
        gates_BTHZ = self.branch_gate(x).to(at_least_fp32(x.dtype)).sigmoid().unflatten(-1, (-1, 3))
        compress, select, window = gates_BTHZ[..., None].unbind(3)
        y_BTHD = compress * branches[0] + select * branches[1] + window * branches[2]
        return y_BTHD.to(branches[0].dtype)

    def new_cache(
        self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """Create a cache of keys (rotated in two branches) and values (of the window: with value
        residual).

        It holds 2 kv_heads head_dim numbers per token, per token of the window, per token of the
        newest block, and per block.
        """
        shapes: list[tuple[int, ...]] = [(self.config.num_kv_heads, self.head_dim)] * 2
        return NSACache(self.config, batch_size, capacity, shapes, dtype, device)

    def flops(self, seq_len: int) -> int:
        """Count projections, pooling, and scores and sums over the mean number of visible keys.

        Those are the tokens of the window, of the selected blocks, and the compressed blocks so
        far. The selection reads scores that are counted already.
        """
        config = self.config
        query_dim, kv_dim = config.heads * self.head_dim, config.num_kv_heads * self.head_dim
        projections = 2 * self.dim * (2 * query_dim + 6 * kv_dim + 3 * config.heads)
        hidden = self.pool_k.inner.out_features
        pooling = 4 * kv_dim * hidden * (config.compress_block + 1)
        num_blocks = config.block_layout.num_slots(seq_len)
        num_pairs = _pairs_in_window(seq_len, config.window)
        num_pairs += _pairs_in_selected(seq_len, config.select_block, config.select_count)
        # A block is visible to all tokens from its last one on.
        num_pairs += sum(
            seq_len - i for i in range(config.compress_block - 1, seq_len, config.compress_stride)
        )
        return int(projections + (pooling * num_blocks + 4 * query_dim * num_pairs) / seq_len)


def _pairs_in_window(context: int, window: int) -> int:
    """Count (query, key) pairs of all tokens in the window branch."""
    window = min(window, context)
    return window * (window + 1) // 2 + (context - window) * window


def _pairs_in_selected(context: int, size: int, count: int) -> int:
    """Count (query, key) pairs of all tokens in the select branch.

    A token sees all blocks while there are at most `count`; then it sees count - 1 blocks and its
    own.
    """
    full_blocks, rest = divmod(context, size)
    own = full_blocks * (size * (size + 1) // 2) + rest * (rest + 1) // 2
    others = sum(min(j, count - 1) for j in range(full_blocks)) * size + rest * min(
        full_blocks, count - 1
    )
    return own + others * size


class NSAKeyValues(NamedTuple):
    """The keys and values of all branches for the queries of one call."""

    block_positions: BlockPositions
    span: Span
    """All earlier tokens of the document, for the select branch."""
    compress_kv: KeyValue
    """Compressed keys and values, (B, N, G, D) each."""
    select_kv: KeyValue
    """Keys and values of the select branch, (B, S, G, D) each, in order of position."""
    window_kv: KeyValue
    """Keys and values of the window branch."""
    window_span: Span


class NSACache:
    """The caches of the three branches.

    They hold all tokens of the select branch, the last `window` tokens of the window branch, all
    compressed blocks, and the last `compress_block` tokens, which are not compressed yet.
    """

    def __init__(
        self,
        config: NSA,
        batch_size: int,
        capacity: int,
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.select_cache = KVCache(batch_size, capacity, shapes, dtype, device)
        self.window_cache = RotatingKVCache(
            batch_size, capacity, config.window, shapes, dtype, device
        )
        self.compress_cache = BlockCache(
            config.block_layout, batch_size, capacity, shapes, shapes, dtype, device
        )

    @property
    def lengths(self) -> Tensor:
        """Number of cached tokens of each row, (B,)."""
        return self.select_cache.lengths

    def append(
        self,
        segments_BT: Tensor | None,
        pool: Callable[[Tensor, Tensor], KeyValue],
        compress_kv: KeyValue,
        select_kv: KeyValue,
        window_kv: KeyValue,
    ) -> NSAKeyValues:
        """Append keys and values (B, T, G, D) of every branch; return all visible ones."""
        (select_k, select_v), span = self.select_cache.append(segments_BT, *select_kv)
        positions = block_positions(
            span, compress_kv[0].shape[1], select_k.shape[1], select_k.device
        )
        ended = self.compress_cache.append(segments_BT, positions, *compress_kv)
        pooled_k, pooled_v = pool(*(tokens.to(compress_kv[0].dtype) for tokens in ended.tokens))
        k_BNGD, v_BNGD = self.compress_cache.append_blocks(ended, pooled_k, pooled_v)
        (window_k, window_v), window_span = self.window_cache.append(segments_BT, *window_kv)
        return NSAKeyValues(
            positions,
            span,
            (k_BNGD, v_BNGD),
            (select_k, select_v),
            (window_k, window_v),
            window_span,
        )

    def select(self, rows: Tensor) -> None:
        """Select, reorder or repeat rows."""
        for cache in (self.select_cache, self.window_cache, self.compress_cache):
            cache.select(rows)

    def check_truncate(self, lengths: Tensor) -> None:
        """Raise CannotTruncate if window or newest block have dropped tokens."""
        for cache in (self.window_cache, self.compress_cache, self.select_cache):
            cache.check_truncate(lengths)

    def truncate(self, lengths: Tensor) -> None:
        """Remove the newest tokens."""
        truncate_caches((self.window_cache, self.compress_cache, self.select_cache), lengths)

    def join(self, other: "NSACache") -> None:
        """Append the rows of another cache."""
        self.select_cache.join(other.select_cache)
        self.window_cache.join(other.window_cache)
        self.compress_cache.join(other.compress_cache)

    def nbytes(self) -> int:
        """Return the bytes of all branch caches."""
        return (
            self.select_cache.nbytes() + self.window_cache.nbytes() + self.compress_cache.nbytes()
        )

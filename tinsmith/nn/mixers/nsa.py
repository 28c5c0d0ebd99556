"""Native Sparse Attention (Yuan et al., 2502.11089): three ways to look back, mixed by gates.

    y_t = O sum_b g_t^b attention(q_t, K_t^b, V_t^b)      g_t^b = sigmoid(W_b x_t), per head

- compress: keys and values of blocks of `compress_block` tokens, one block every `compress_stride`,
  each pooled by an MLP over its tokens laid side by side, plus learned positions within the block.
  A block is seen once its last token is; where none is seen yet the branch says 0.
- select: the raw tokens of the `select_count` blocks of `select_block` tokens that the compress
  branch pays most attention to (`parts/importance.py`); the heads of a group choose together. The
  query's own block, the first and the previous one are always among them, so there is something
  to choose from 4 on.
- window: the last `window` tokens, the query's own included.

Each branch has its own keys and values; queries are shared. Blocks are counted from the first token
of each document. The paper says nothing of positions in the compress branch: here its keys are
pooled, and its queries used, before rotation. Gates are one linear layer; the paper says MLP. The
window branch takes part in the value residual (2410.17897).

Legend: B rows, T tokens, S keys, H query heads, G key and value heads, D head width, N compressed
blocks, L tokens of a block, C chosen blocks.
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
from tinsmith.nn.contract import BuildContext, Ctx, LayerCache, Mixer, Out
from tinsmith.nn.layers.init import ResidualProj
from tinsmith.nn.layers.norm import RMSNorm
from tinsmith.nn.precision import at_least_fp32

KeyValue = tuple[Tensor, Tensor]
"""Keys and values."""


@dataclass(frozen=True, kw_only=True)
class NSA(GroupedHeads):
    """Native sparse attention: compressed blocks, chosen blocks and a window."""

    kind: Literal["nsa"] = "nsa"
    heads: Size = 8
    kv_heads: Size | None = 2  # null: = heads
    head_dim: Size | None = None  # = dim // heads
    compress_block: Size = 32
    compress_stride: Size = 16
    compress_hidden: Size | None = None  # of the pooling MLP, = 2 head_dim
    select_block: Size = 64
    select_count: Size = (
        16  # own, first and previous block always, in this order; the rest by choice
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
        """How tokens are compressed."""
        return BlockLayout(self.compress_block, self.compress_stride)

    def build(self, build_ctx: BuildContext) -> "NSAMixer":
        """Build the module."""
        return NSAMixer(self, build_ctx)


class MLPPool(nn.Module):
    """phi of the paper: the tokens of a block side by side, with their places, through an MLP."""

    def __init__(self, size: int, width: int, hidden: int):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(size, width))
        self.inner = nn.Linear(size * width, hidden)
        # A bias here would add the same to every key, which softmax does not see.
        self.outer = nn.Linear(hidden, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., L, G, D) -> (..., G, D)."""
        placed = tokens.transpose(-3, -2) + self.positions
        return self.outer(F.gelu(self.inner(placed.flatten(-2))))


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
        inner, outer = config.heads * self.head_dim, config.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(build_ctx.dim, inner, bias=False)
        self.compress_k = nn.Linear(build_ctx.dim, outer, bias=False)
        self.compress_v = nn.Linear(build_ctx.dim, outer, bias=False)
        self.select_k = nn.Linear(build_ctx.dim, outer, bias=False)
        self.select_v = nn.Linear(build_ctx.dim, outer, bias=False)
        self.window_k = nn.Linear(build_ctx.dim, outer, bias=False)
        self.window_v = nn.Linear(build_ctx.dim, outer, bias=False)
        hidden = config.compress_hidden or 2 * self.head_dim
        self.pool_k = MLPPool(config.compress_block, self.head_dim, hidden)
        self.pool_v = MLPPool(config.compress_block, self.head_dim, hidden)
        self.branch_gate = BranchGate(build_ctx.dim, 3 * config.heads)
        self.o_proj = ResidualProj(inner, build_ctx.dim, bias=False)
        norms = [
            RMSNorm(self.head_dim, build_ctx.norm_eps) for _ in range(4 if config.qk_norm else 0)
        ]
        plain = [nn.Identity() for _ in range(4 - len(norms))]
        self.q_norm, self.compress_norm, self.select_norm, self.window_norm = norms + plain
        mixes = config.value_residual and not build_ctx.is_value_residual_source
        self.value_mix = nn.Parameter(torch.full((2,), 0.5)) if mixes else None

    def forward(self, x: Tensor, ctx: Ctx, cache: Any = None) -> Out:
        """x (B, T, D) -> Out.y (B, T, D)."""
        q_BTHD = self.q_norm(self._heads(self.q_proj, x))
        raw = self.compress_norm(self._heads(self.compress_k, x)), self._heads(self.compress_v, x)
        far_k_BTGD = self.select_norm(self._heads(self.select_k, x))
        near_k_BTGD = self.window_norm(self._heads(self.window_k, x))
        near_v_BTGD = offered = self._heads(self.window_v, x)
        turned_BTHD = q_BTHD
        if self.rotary_dim:
            rotary = ctx.rotary[self.rotary_dim]
            turned_BTHD, far_k_BTGD = (
                apply_rotary_emb(q_BTHD, rotary),
                apply_rotary_emb(far_k_BTGD, rotary),
            )
            near_k_BTGD = apply_rotary_emb(near_k_BTGD, rotary)
        if self.value_mix is not None and ctx.value_residual is not None:
            mixed = self.value_mix[0] * ctx.value_residual + self.value_mix[1] * near_v_BTGD
            near_v_BTGD = mixed.to(near_v_BTGD.dtype)
        far, near = (far_k_BTGD, self._heads(self.select_v, x)), (near_k_BTGD, near_v_BTGD)
        if cache is None:
            held = self._hold(ctx, raw, far, near)
        else:
            held = cache.append(ctx.segments, self._pool, raw, far, near)
        y_BTHD = self._gated(x, self._branches(q_BTHD, turned_BTHD, held))
        value = offered if self.config.value_residual else None
        return Out(self.o_proj(y_BTHD.flatten(2)), value_residual=value)

    def _heads(self, linear: nn.Linear, x: Tensor) -> Tensor:
        return linear(x).unflatten(-1, (-1, self.head_dim))

    def _pool(self, k: Tensor, v: Tensor) -> KeyValue:
        """Tokens of blocks (..., L, G, D) each -> (..., G, D) each."""
        return self.pool_k(k), self.pool_v(v)

    def _hold(self, ctx: Ctx, raw: KeyValue, far: KeyValue, near: KeyValue) -> "NSAKeyValues":
        """What is seen of the tokens of one call, without a cache."""
        length, device = near[0].shape[1], near[0].device
        seen = ctx.span()
        cut = self.config.block_layout.gather_blocks
        pooled = self._pool(cut(raw[0], seen), cut(raw[1], seen))
        window = ctx.span(self.config.window)
        return NSAKeyValues(
            block_positions(seen, length, length, device), seen, pooled, far, near, window
        )

    def _branches(self, q_BTHD: Tensor, turned_BTHD: Tensor, held: "NSAKeyValues") -> list[Tensor]:
        """What each branch says, (B, T, H, D) each."""
        kind, dropout = self.attention, self.dropout if self.training else 0.0
        blocks, at = self.config.block_layout, held.block_positions
        return [
            attend_compressed(q_BTHD, *held.compress_kv, blocks, at, kind=kind, dropout=dropout),
            self._selected(q_BTHD, turned_BTHD, held, kind, dropout),
            attend(turned_BTHD, *held.window_kv, held.window_span, kind=kind, dropout=dropout),
        ]

    def _selected(
        self, q_BTHD: Tensor, turned_BTHD: Tensor, held: "NSAKeyValues", kind: str, dropout: float
    ) -> Tensor:
        """Of so few tokens that every block is chosen, no choice is made."""
        keys, size, count = (
            held.select_kv[0].shape[1],
            self.config.select_block,
            self.config.select_count,
        )
        if keys <= count * size:
            return attend(turned_BTHD, *held.select_kv, held.span, kind=kind, dropout=dropout)
        k_BNGD, blocks, at = held.compress_kv[0], self.config.block_layout, held.block_positions
        begins = select_blocks(q_BTHD, k_BNGD, blocks, at, keys=keys, size=size, count=count)
        given = (turned_BTHD, *held.select_kv, begins, at.cache_position_BT, size)
        return attend_topk_blocks(*given, kind=kind, dropout=dropout)

    def _gated(self, x: Tensor, branches: list[Tensor]) -> Tensor:
        """The sum of the branches, each times its gate."""
        gates_BTHZ = self.branch_gate(x).to(at_least_fp32(x.dtype)).sigmoid().unflatten(-1, (-1, 3))
        compress, select, window = gates_BTHZ[..., None].unbind(3)
        y_BTHD = compress * branches[0] + select * branches[1] + window * branches[2]
        return y_BTHD.to(branches[0].dtype)

    def new_cache(
        self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """Keys (rotated in two branches) and values (of the window: already mixed): 2 kv_heads
        head_dim numbers per token held, of the window, of the newest block, and per block.
        """
        shapes: list[tuple[int, ...]] = [(self.config.num_kv_heads, self.head_dim)] * 2
        return NSACache(self.config, batch_size, capacity, shapes, dtype, device)

    def flops(self, seq_len: int) -> int:
        """Projections, pooling, and scores and sums over what each branch sees on average: the
        tokens of the window, those of the chosen blocks, the compressed blocks so far. Choosing
        reads scores that are counted already.
        """
        config = self.config
        inner, outer = config.heads * self.head_dim, config.num_kv_heads * self.head_dim
        projections = 2 * self.dim * (2 * inner + 6 * outer + 3 * config.heads)
        hidden = self.pool_k.inner.out_features
        pooling = 4 * outer * hidden * (config.compress_block + 1)
        blocks = config.block_layout.num_slots(seq_len)
        seen = _seen_in_window(seq_len, config.window)
        seen += _seen_in_chosen(seq_len, config.select_block, config.select_count)
        # Block i is seen by all tokens from its last one on.
        seen += sum(
            seq_len - i for i in range(config.compress_block - 1, seq_len, config.compress_stride)
        )
        return int(projections + (pooling * blocks + 4 * inner * seen) / seq_len)


def _seen_in_window(context: int, window: int) -> int:
    """Keys seen by all tokens together."""
    window = min(window, context)
    return window * (window + 1) // 2 + (context - window) * window


def _seen_in_chosen(context: int, size: int, count: int) -> int:
    """The same: all tokens while all blocks are chosen, then count - 1 blocks and the own one."""
    begun, rest = divmod(context, size)
    own = begun * (size * (size + 1) // 2) + rest * (rest + 1) // 2
    others = sum(min(j, count - 1) for j in range(begun)) * size + rest * min(begun, count - 1)
    return own + others * size


class NSAKeyValues(NamedTuple):
    """What the queries of a call attend to."""

    block_positions: BlockPositions
    span: Span
    """All earlier tokens of the document, of those to choose from."""
    compress_kv: KeyValue
    """Compressed keys and values, (B, N, G, D) each."""
    select_kv: KeyValue
    """Keys and values to choose from, (B, S, G, D) each, in order of places."""
    window_kv: KeyValue
    """Keys and values of the window branch."""
    window_span: Span


class NSACache:
    """All tokens of the select branch, the last `window` ones of the window branch, the compressed
    blocks, and of the last `compress_block` tokens what is to be compressed.
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
        """(B,) tokens absorbed per row."""
        return self.select_cache.lengths

    def append(
        self,
        segments_BT: Tensor | None,
        pool: Callable[[Tensor, Tensor], KeyValue],
        compress_kv: KeyValue,
        select_kv: KeyValue,
        window_kv: KeyValue,
    ) -> NSAKeyValues:
        """Take in (B, T, G, D) keys and values of every branch; return all that they may see."""
        (far_k, far_v), seen = self.select_cache.append(segments_BT, *select_kv)
        at = block_positions(seen, compress_kv[0].shape[1], far_k.shape[1], far_k.device)
        ended = self.compress_cache.append(segments_BT, at, *compress_kv)
        pooled_k, pooled_v = pool(*(tokens.to(compress_kv[0].dtype) for tokens in ended.tokens))
        k_BNGD, v_BNGD = self.compress_cache.append_blocks(ended, pooled_k, pooled_v)
        (near_k, near_v), window = self.window_cache.append(segments_BT, *window_kv)
        return NSAKeyValues(at, seen, (k_BNGD, v_BNGD), (far_k, far_v), (near_k, near_v), window)

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows."""
        for part in (self.select_cache, self.window_cache, self.compress_cache):
            part.select(rows)

    def truncate(self, lengths: Tensor) -> None:
        """Forget the newest tokens; possible while neither window nor newest block has dropped
        any.
        """
        parts = (self.window_cache, self.compress_cache, self.select_cache)
        for part in parts:
            part.check_truncate(lengths)
        for part in parts:
            part.truncate(lengths)

    def join(self, other: "NSACache") -> None:
        """Append the rows of another cache."""
        self.select_cache.join(other.select_cache)
        self.window_cache.join(other.window_cache)
        self.compress_cache.join(other.compress_cache)

    def nbytes(self) -> int:
        """All of it."""
        return (
            self.select_cache.nbytes() + self.window_cache.nbytes() + self.compress_cache.nbytes()
        )

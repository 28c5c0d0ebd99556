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
from tinsmith.nn.contract import Ctx, LayerCache, Mixer, Out, Site
from tinsmith.nn.parts.attend import Reach, attend, reach
from tinsmith.nn.parts.blocks import BlockCache, Blocks, Spots, attend_blocks, spots
from tinsmith.nn.parts.cache import Append, Ring
from tinsmith.nn.parts.heads import BranchGate, GroupedHeads
from tinsmith.nn.parts.importance import choose_blocks
from tinsmith.nn.parts.init import Output
from tinsmith.nn.parts.norm import RMSNorm, wide
from tinsmith.nn.parts.rope import rotate
from tinsmith.nn.parts.selected import attend_selected

Pair = tuple[Tensor, Tensor]
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
        if self.heads % self.groups:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        for name in ("compress_block", "select_block"):
            if getattr(self, name) % self.compress_stride:
                stride = f"compress_stride={self.compress_stride}"
                raise ValueError(f"{name}={getattr(self, name)} must be a multiple of {stride}")
        if self.compress_block > self.select_block:
            blocks = f"select_block={self.select_block}"
            raise ValueError(f"compress_block={self.compress_block} must be at most {blocks}")

    @property
    def blocks(self) -> Blocks:
        """How tokens are compressed."""
        return Blocks(self.compress_block, self.compress_stride)

    def build(self, site: Site) -> "NSAMixer":
        """The module."""
        return NSAMixer(self, site)


class Pool(nn.Module):
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

    def __init__(self, config: NSA, site: Site):
        super().__init__()
        self.config, self.dim, self.width = config, site.dim, config.width(site.dim)
        self.attention, self.dropout = site.attention, site.attention_dropout
        self.rotary_dim = self.width if config.rope and site.rotary else None
        inner, outer = config.heads * self.width, config.groups * self.width
        self.q_proj = nn.Linear(site.dim, inner, bias=False)
        self.compress_k = nn.Linear(site.dim, outer, bias=False)
        self.compress_v = nn.Linear(site.dim, outer, bias=False)
        self.select_k = nn.Linear(site.dim, outer, bias=False)
        self.select_v = nn.Linear(site.dim, outer, bias=False)
        self.window_k = nn.Linear(site.dim, outer, bias=False)
        self.window_v = nn.Linear(site.dim, outer, bias=False)
        hidden = config.compress_hidden or 2 * self.width
        self.pool_k = Pool(config.compress_block, self.width, hidden)
        self.pool_v = Pool(config.compress_block, self.width, hidden)
        self.branch_gate = BranchGate(site.dim, 3 * config.heads)
        self.o_proj = Output(inner, site.dim, bias=False)
        norms = [RMSNorm(self.width, site.norm_eps) for _ in range(4 if config.qk_norm else 0)]
        plain = [nn.Identity() for _ in range(4 - len(norms))]
        self.q_norm, self.compress_norm, self.select_norm, self.window_norm = norms + plain
        mixes = config.value_residual and not site.first_value
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
            turned_BTHD, far_k_BTGD = rotate(q_BTHD, rotary), rotate(far_k_BTGD, rotary)
            near_k_BTGD = rotate(near_k_BTGD, rotary)
        if self.value_mix is not None and ctx.value is not None:
            mixed = self.value_mix[0] * ctx.value + self.value_mix[1] * near_v_BTGD
            near_v_BTGD = mixed.to(near_v_BTGD.dtype)
        far, near = (far_k_BTGD, self._heads(self.select_v, x)), (near_k_BTGD, near_v_BTGD)
        if cache is None:
            held = self._hold(ctx.segments, raw, far, near)
        else:
            held = cache.take(ctx.segments, self._pool, raw, far, near)
        y_BTHD = self._gated(x, self._branches(q_BTHD, turned_BTHD, held))
        value = offered if self.config.value_residual else None
        return Out(self.o_proj(y_BTHD.flatten(2)), value=value)

    def _heads(self, linear: nn.Linear, x: Tensor) -> Tensor:
        return linear(x).unflatten(-1, (-1, self.width))

    def _pool(self, k: Tensor, v: Tensor) -> Pair:
        """Tokens of blocks (..., L, G, D) each -> (..., G, D) each."""
        return self.pool_k(k), self.pool_v(v)

    def _hold(self, segments_BT: Tensor | None, raw: Pair, far: Pair, near: Pair) -> "Held":
        """What is seen of the tokens of one call, without a cache."""
        length, device = near[0].shape[1], near[0].device
        seen = reach(segments_BT, length, None, device)
        cut = self.config.blocks.cut
        pooled = self._pool(cut(raw[0], seen), cut(raw[1], seen))
        window = reach(segments_BT, length, self.config.window, device)
        return Held(spots(seen, length, length, device), seen, pooled, far, near, window)

    def _branches(self, q_BTHD: Tensor, turned_BTHD: Tensor, held: "Held") -> list[Tensor]:
        """What each branch says, (B, T, H, D) each."""
        kind, dropout = self.attention, self.dropout if self.training else 0.0
        blocks, at = self.config.blocks, held.at
        return [
            attend_blocks(q_BTHD, *held.pooled, blocks, at, kind=kind, dropout=dropout),
            self._selected(q_BTHD, turned_BTHD, held, kind, dropout),
            attend(turned_BTHD, *held.near, held.window, kind=kind, dropout=dropout),
        ]

    def _selected(
        self, q_BTHD: Tensor, turned_BTHD: Tensor, held: "Held", kind: str, dropout: float
    ) -> Tensor:
        """Of so few tokens that every block is chosen, no choice is made."""
        keys, size, count = held.far[0].shape[1], self.config.select_block, self.config.select_count
        if keys <= count * size:
            return attend(turned_BTHD, *held.far, held.seen, kind=kind, dropout=dropout)
        k_BNGD, blocks, at = held.pooled[0], self.config.blocks, held.at
        begins = choose_blocks(q_BTHD, k_BNGD, blocks, at, keys=keys, size=size, count=count)
        given = (turned_BTHD, *held.far, begins, at.place_BT, size)
        return attend_selected(*given, kind=kind, dropout=dropout)

    def _gated(self, x: Tensor, branches: list[Tensor]) -> Tensor:
        """The sum of the branches, each times its gate."""
        gates_BTHZ = self.branch_gate(x).to(wide(x.dtype)).sigmoid().unflatten(-1, (-1, 3))
        compress, select, window = gates_BTHZ[..., None].unbind(3)
        y_BTHD = compress * branches[0] + select * branches[1] + window * branches[2]
        return y_BTHD.to(branches[0].dtype)

    def new_cache(
        self, rows: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """Keys (rotated in two branches) and values (of the window: already mixed): 2 kv_heads
        head_dim numbers per token held, of the window, of the newest block, and per block.
        """
        shapes: list[tuple[int, ...]] = [(self.config.groups, self.width)] * 2
        return NSACache(self.config, rows, capacity, shapes, dtype, device)

    def flops(self, context: int) -> int:
        """Projections, pooling, and scores and sums over what each branch sees on average: the
        tokens of the window, those of the chosen blocks, the compressed blocks so far. Choosing
        reads scores that are counted already.
        """
        config = self.config
        inner, outer = config.heads * self.width, config.groups * self.width
        projections = 2 * self.dim * (2 * inner + 6 * outer + 3 * config.heads)
        hidden = self.pool_k.inner.out_features
        pooling = 4 * outer * hidden * (config.compress_block + 1)
        blocks = config.blocks.slots(context)
        seen = _seen_in_window(context, config.window)
        seen += _seen_in_chosen(context, config.select_block, config.select_count)
        # Block i is seen by all tokens from its last one on.
        seen += sum(
            context - i for i in range(config.compress_block - 1, context, config.compress_stride)
        )
        return int(projections + (pooling * blocks + 4 * inner * seen) / context)


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


class Held(NamedTuple):
    """What the queries of a call attend to."""

    at: Spots
    seen: Reach
    """All earlier tokens of the document, of those to choose from."""
    pooled: Pair
    """Compressed keys and values, (B, N, G, D) each."""
    far: Pair
    """Keys and values to choose from, (B, S, G, D) each, in order of places."""
    near: Pair
    """Keys and values of the window branch."""
    window: Reach


class NSACache:
    """All tokens of the select branch, the last `window` ones of the window branch, the compressed
    blocks, and of the last `compress_block` tokens what is to be compressed.
    """

    def __init__(
        self,
        config: NSA,
        rows: int,
        capacity: int,
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.far = Append(rows, capacity, shapes, dtype, device)
        self.near = Ring(rows, capacity, config.window, shapes, dtype, device)
        self.blocks = BlockCache(config.blocks, rows, capacity, shapes, shapes, dtype, device)

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens absorbed per row."""
        return self.far.lengths

    def take(
        self,
        segments_BT: Tensor | None,
        pool: Callable[[Tensor, Tensor], Pair],
        raw: Pair,
        far: Pair,
        near: Pair,
    ) -> Held:
        """Take in (B, T, G, D) keys and values of every branch; return all that they may see."""
        (far_k, far_v), seen = self.far.append(segments_BT, *far)
        at = spots(seen, raw[0].shape[1], far_k.shape[1], far_k.device)
        ended = self.blocks.take(segments_BT, at, *raw)
        pooled_k, pooled_v = pool(*(tokens.to(raw[0].dtype) for tokens in ended.tokens))
        k_BNGD, v_BNGD = self.blocks.keep(ended, pooled_k, pooled_v)
        (near_k, near_v), window = self.near.append(segments_BT, *near)
        return Held(at, seen, (k_BNGD, v_BNGD), (far_k, far_v), (near_k, near_v), window)

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows."""
        for part in (self.far, self.near, self.blocks):
            part.select(rows)

    def truncate(self, lengths: Tensor) -> None:
        """Forget the newest tokens; possible while neither window nor newest block has dropped
        any.
        """
        parts = (self.near, self.blocks, self.far)
        for part in parts:
            part.check_rewind(lengths)
        for part in parts:
            part.truncate(lengths)

    def join(self, other: "NSACache") -> None:
        """Append the rows of another cache."""
        self.far.join(other.far)
        self.near.join(other.near)
        self.blocks.join(other.blocks)

    def nbytes(self) -> int:
        """All of it."""
        return self.far.nbytes() + self.near.nbytes() + self.blocks.nbytes()

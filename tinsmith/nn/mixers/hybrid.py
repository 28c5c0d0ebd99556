"""Tiny-R2's hybrid attention: up to three branches of latent queries, mixed per token and head.

    y_t = O sum_b g_t^b branch_b(q_t)      g_t = softmax_b or sigmoid of W x_t

- compress: the latent and the shared key of `parts.latent`, pooled over blocks of `compress_block`
  tokens channel by channel: sum_j softmax_j(W c_j + B_j) c_j. The pooled key is turned at the
  position of the block's last token. A block is seen once that token is; where none is, the branch
  says 0. A block of one token is plain latent attention.
- select: keys and values of its own; each query attends to the `keep` tokens that an indexer
  chooses (`parts.indexer`, which learns from its own loss), all heads to the same.
- window: keys and values of its own, of the last `window` tokens, the query's own included.

`mode` names the seed's combinations, `branches` any. A single branch has no gate. The published
code leaks future tokens, applies no window and never pools: this is what its document describes.

Legend: B rows, T tokens, H heads, N un-turned part of a head, R turned part, C latent, V values, M
blocks, Z branches.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from tinsmith.core.parse import Size
from tinsmith.nn.contract import Ctx, LayerCache, Mixer, Out, Rotary, Site
from tinsmith.nn.parts.attend import Reach, attend, reach
from tinsmith.nn.parts.blocks import BlockCache, Blocks, Spots, attend_blocks, spots
from tinsmith.nn.parts.cache import Append, Ring
from tinsmith.nn.parts.chosen import Choice, attend_chosen
from tinsmith.nn.parts.heads import BranchGate
from tinsmith.nn.parts.indexer import Indexer, check_index
from tinsmith.nn.parts.init import Output
from tinsmith.nn.parts.latent import LatentHeads, linear_flops
from tinsmith.nn.parts.norm import wide
from tinsmith.nn.parts.rope import rotate

Name = Literal["compress", "select", "window"]
MODES: dict[str, tuple[Name, ...]] = {
    "nsa": ("compress", "select", "window"),
    "swa": ("compress", "window"),
    "dsa": ("compress", "select"),
}


@dataclass(frozen=True, kw_only=True)
class Hybrid(LatentHeads):
    """Compressed blocks, chosen tokens and a window; the defaults are Tiny-R2's."""

    kind: Literal["hybrid"] = "hybrid"
    mode: Literal["nsa", "swa", "dsa"] | None = None  # nsa, unless branches are named
    branches: tuple[Name, ...] | None = None
    compress_block: Size = 16
    window: Size = 128
    keep: Size = 128
    index_heads: Size = 4
    index_dim: Size = 32
    index_weight: float = 1.0
    index_target: Literal["dense", "selected"] = "dense"
    gate: Literal["softmax", "sigmoid"] = "softmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_index(self)
        for name in ("compress_block", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.mode is not None and self.branches is not None:
            raise ValueError(f"give mode={self.mode} or branches, not both")
        if not self.present or len(set(self.present)) < len(self.present):
            raise ValueError(f"branches={list(self.present)} must be some, each once")

    @property
    def present(self) -> tuple[Name, ...]:
        """The branches that are built."""
        return MODES[self.mode or "nsa"] if self.branches is None else self.branches

    @property
    def blocks(self) -> Blocks:
        """How tokens are compressed."""
        return Blocks(self.compress_block, self.compress_block)

    def build(self, site: Site) -> "HybridMixer":
        """The module."""
        return HybridMixer(self, site)


class Asked(NamedTuple):
    """What every branch may read."""

    x: Tensor
    nope_BTHN: Tensor
    rope_BTHR: Tensor
    """Turned."""
    source: Tensor
    """What queries are made of."""
    rotary: Rotary | None
    ctx: Ctx
    seen: Reach
    """All earlier tokens of the document, in order of places."""
    at: Spots
    dropout: float

    @property
    def q_BTHD(self) -> Tensor:
        """The whole queries."""
        return torch.cat((self.nope_BTHN, self.rope_BTHR), -1)


class HybridMixer(Mixer):
    """The module of `Hybrid`."""

    def __init__(self, config: Hybrid, site: Site):
        super().__init__()
        self.config, self.dim = config, site.dim
        self.rotary_dim = config.rope_dim if site.rotary else None
        self.nope_factor = site.rotary_factor**2
        self.dropout = site.attention_dropout
        self.queries = config.queries(site.dim)
        branches = {name: _BRANCHES[name](config, site) for name in config.present}
        self.branches = cast(Mapping[str, Branch], nn.ModuleDict(branches))
        gates = config.heads * len(branches)
        self.branch_gate = BranchGate(site.dim, gates) if len(branches) > 1 else None
        self.o_proj = Output(config.heads * config.v_dim, site.dim, bias=False)

    def forward(self, x: Tensor, ctx: Ctx, cache: Any = None) -> Out:
        """x (B, T, D) -> Out.y (B, T, D); in training, the losses of an indexer."""
        rotary = ctx.rotary[self.rotary_dim] if self.rotary_dim else None
        nope_BTHN, rope_BTHR, source = self.queries(x, rotary)
        if cache is None:
            seen, keys = reach(ctx.segments, x.shape[1], None, x.device), x.shape[1]
        else:
            seen, keys = cache.count(ctx.segments, x)
        at = spots(seen, x.shape[1], keys, x.device)
        dropout = self.dropout if self.training else 0.0
        nope_BTHN = nope_BTHN * self.nope_factor
        asked = Asked(x, nope_BTHN, rope_BTHR, source, rotary, ctx, seen, at, dropout)
        said, losses = [], {}
        for name, branch in self.branches.items():
            y_BTHV, more = branch(asked, None if cache is None else cache.parts[name])
            said.append(y_BTHV)
            losses |= more
        return Out(self.o_proj(self._mixed(x, said).flatten(2)), losses)

    def _mixed(self, x: Tensor, said: list[Tensor]) -> Tensor:
        if self.branch_gate is None:
            return said[0]
        scores_BTHZ = self.branch_gate(x).to(wide(x.dtype)).unflatten(-1, (-1, len(said)))
        softmax = self.config.gate == "softmax"
        gates_BTHZ = scores_BTHZ.softmax(-1) if softmax else scores_BTHZ.sigmoid()
        parts = (gate * y for gate, y in zip(gates_BTHZ[..., None].unbind(3), said, strict=True))
        return sum(parts, start=torch.zeros_like(said[0])).to(said[0].dtype)

    def new_cache(
        self, rows: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """What each branch remembers; see there."""
        parts = {
            name: branch.new_cache(rows, capacity, dtype, device)
            for name, branch in self.branches.items()
        }
        return HybridCache(parts, Append(rows, capacity, [(0,)], dtype, device))

    def flops(self, context: int) -> int:
        """Projections, and what each branch does with the tokens that it sees on average."""
        said = sum(branch.flops(context) for branch in self.branches.values())
        return int(linear_flops(self) + said)


class Branch(nn.Module):
    """One way to look back."""

    def forward(self, asked: Asked, cache: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, T, H, V), and losses."""
        raise NotImplementedError

    def new_cache(
        self, rows: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> BlockCache | Append:
        """What it remembers."""
        raise NotImplementedError

    def flops(self, context: int) -> float:
        """Beyond its linear layers, per token."""
        raise NotImplementedError


class CompressBranch(Branch):
    """Latent attention to pooled blocks."""

    def __init__(self, config: Hybrid, site: Site):
        super().__init__()
        self.config, self.kind = config, site.attention
        self.keys = config.keys(site.dim)
        alone = config.compress_block == 1
        pools = ((config.compress_block, width) for width in (config.kv_rank, config.rope_dim))
        self.pool_latent, self.pool_key = (Alone() if alone else SoftPool(*pool) for pool in pools)

    def forward(self, asked: Asked, cache: BlockCache | None) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, T, H, V), 0 where no block is seen."""
        new = self.keys(asked.x, None)
        if cache is None:
            latent_BMC, rope_BMR = self._cut(asked, *new)
        else:
            latent_BMC, rope_BMR = self._kept(asked, cache, *new)
        few = cache is not None and self.config.absorbing_pays(asked.x.shape[1])
        return (self._absorbed if few else self._expanded)(asked, latent_BMC, rope_BMR), {}

    def _cut(self, asked: Asked, latent_BTC: Tensor, rope_BTR: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks of the tokens of one call."""

        def cut(tensor: Tensor) -> Tensor:
            return self.config.blocks.cut(tensor, asked.seen)

        rope_BMR = self.pool_key(cut(rope_BTR))
        if asked.rotary is not None:
            tables = (table.expand(len(rope_BTR), -1, -1) for table in asked.rotary)
            cos, sin = (cut(table)[:, :, -1] for table in tables)
            rope_BMR = rotate(rope_BMR[:, :, None], (cos, sin))[:, :, 0]
        return self.pool_latent(cut(latent_BTC)), rope_BMR

    def _kept(
        self, asked: Asked, cache: BlockCache, latent_BTC: Tensor, rope_BTR: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All blocks so far, those that end in this call taken in."""
        ended = cache.take(asked.ctx.segments, asked.at, latent_BTC, rope_BTR)
        latent_ELC, rope_ELR = (tokens.to(asked.x.dtype) for tokens in ended.tokens)
        rope_ER = self.pool_key(rope_ELR)
        if asked.rotary is not None:
            tables = (table.expand(len(rope_BTR), -1, -1) for table in asked.rotary)
            cos, sin = (table[ended.row_E, ended.column_E][:, None] for table in tables)
            rope_ER = rotate(rope_ER[:, None, None], (cos, sin))[:, 0, 0]
        kept = cache.keep(ended, self.pool_latent(latent_ELC), rope_ER)
        latent_BMC, rope_BMR = (tensor.to(asked.x.dtype) for tensor in kept)
        return latent_BMC, rope_BMR

    def _expanded(self, asked: Asked, latent_BMC: Tensor, rope_BMR: Tensor) -> Tensor:
        k_BMHD, v_BMHV = self.keys.expanded(latent_BMC, rope_BMR)
        return self._attend(asked.q_BTHD, k_BMHD, v_BMHV, asked)

    def _absorbed(self, asked: Asked, latent_BMC: Tensor, rope_BMR: Tensor) -> Tensor:
        q_BTHD = self.keys.absorbed(asked.nope_BTHN, asked.rope_BTHR)
        k_BM1D = torch.cat((latent_BMC, rope_BMR), -1)[:, :, None]
        return self.keys.values(self._attend(q_BTHD, k_BM1D, latent_BMC[:, :, None], asked))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> Tensor:
        blocks, dropout = self.config.blocks, asked.dropout
        return attend_blocks(q, k, v, blocks, asked.at, kind=self.kind, dropout=dropout)

    def new_cache(
        self, rows: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> BlockCache:
        """Per block, and for each of the newest `compress_block` tokens, kv_rank + rope_dim."""
        shapes: list[tuple[int, ...]] = [(self.config.kv_rank,), (self.config.rope_dim,)]
        return BlockCache(self.config.blocks, rows, capacity, shapes, shapes, dtype, device)

    def flops(self, context: int) -> float:
        """Scores and sums, of half of the blocks on average."""
        return self.config.pair_flops * (context + 1) / 2 / self.config.compress_block


class SoftPool(nn.Module):
    """sum_j softmax_j(W c_j + B_j) c_j over the tokens j of a block, channel by channel."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.score = nn.Linear(width, width, bias=False)
        self.places = nn.Parameter(torch.zeros(size, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., L, C) -> (..., C)."""
        scores = (self.score(tokens) + self.places).to(wide(tokens.dtype))
        return (scores.softmax(-2) * tokens).sum(-2).to(tokens.dtype)


class Alone(nn.Module):
    """The pool of blocks of one token."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., 1, C) -> (..., C)."""
        return tokens[..., 0, :]


class OwnKeys(nn.Module):
    """Keys and values of every head, straight from x; the last R numbers of keys are turned."""

    def __init__(self, config: Hybrid, dim: int):
        super().__init__()
        self.heads, self.widths = config.heads, (config.nope_dim, config.rope_dim)
        self.k = nn.Linear(dim, config.heads * sum(self.widths), bias=False)
        self.v = nn.Linear(dim, config.heads * config.v_dim, bias=False)
        self.shapes: list[tuple[int, ...]] = [
            (config.heads, sum(self.widths)),
            (config.heads, config.v_dim),
        ]

    def forward(self, asked: Asked) -> tuple[Tensor, Tensor]:
        """(B, T, H, N + R) and (B, T, H, V)."""
        k_BTHD = self.k(asked.x).unflatten(-1, (self.heads, -1))
        v_BTHV = self.v(asked.x).unflatten(-1, (self.heads, -1))
        if asked.rotary is None:
            return k_BTHD, v_BTHV
        nope_BTHN, rope_BTHR = k_BTHD.split(self.widths, -1)
        return torch.cat((nope_BTHN, rotate(rope_BTHR, asked.rotary)), -1), v_BTHV


class SelectBranch(Branch):
    """Attention to the tokens that an indexer chooses."""

    def __init__(self, config: Hybrid, site: Site):
        super().__init__()
        self.config, self.kind = config, site.attention
        self.keys = OwnKeys(config, site.dim)
        source = config.query_source(site.dim)
        self.indexer = Indexer(site.dim, source, config.index_heads, config.index_dim)

    def forward(self, asked: Asked, cache: Append | None) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, T, H, V), and in training the indexer's loss."""
        (k_BSHD, v_BSHV), seen = self.keys(asked), asked.seen
        index = self.indexer(asked.x, asked.source, asked.rotary)
        if cache is not None:
            held, seen = cache.append(asked.ctx.segments, k_BSHD, v_BSHV, index.k_BSE)
            k_BSHD, v_BSHV, k_BSE = (tensor.to(asked.x.dtype) for tensor in held)
            index = index._replace(k_BSE=k_BSE)
        learns = self.config.index_target if self.training else None
        choice = Choice(self.config.keep, learns, self.kind, asked.dropout)
        q_BTHD, segments = asked.q_BTHD, asked.ctx.segments
        y_BTHV, lost = attend_chosen(q_BTHD, k_BSHD, v_BSHV, index, seen, segments, choice)
        return y_BTHV, {} if lost is None else {"indexer": self.config.index_weight * lost}

    def new_cache(
        self, rows: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> Append:
        """Per token, keys and values of every head, and an index key."""
        shapes = [*self.keys.shapes, (self.config.index_dim,)]
        return Append(rows, capacity, shapes, dtype, device)

    def flops(self, context: int) -> float:
        """Index scores of all earlier tokens, attention to the chosen ones."""
        indexed = self.config.index_heads * self.config.index_dim * (context + 1)
        return indexed + self.config.pair_flops * _last(self.config.keep, context)


class WindowBranch(Branch):
    """Attention to the last `window` tokens."""

    def __init__(self, config: Hybrid, site: Site):
        super().__init__()
        self.config, self.kind = config, site.attention
        self.keys = OwnKeys(config, site.dim)

    def forward(self, asked: Asked, cache: Ring | None) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, T, H, V)."""
        (k_BSHD, v_BSHV), segments = self.keys(asked), asked.ctx.segments
        if cache is None:
            seen = reach(segments, k_BSHD.shape[1], self.config.window, k_BSHD.device)
        else:
            (k_BSHD, v_BSHV), seen = cache.append(segments, k_BSHD, v_BSHV)
        q_BTHD, dropout = asked.q_BTHD, asked.dropout
        return attend(q_BTHD, k_BSHD, v_BSHV, seen, kind=self.kind, dropout=dropout), {}

    def new_cache(self, rows: int, capacity: int, dtype: torch.dtype, device: torch.device) -> Ring:
        """Keys and values of every head, of the last `window` tokens."""
        return Ring(rows, capacity, self.config.window, self.keys.shapes, dtype, device)

    def flops(self, context: int) -> float:
        """Scores and sums over a window."""
        return self.config.pair_flops * _last(self.config.window, context)


_BRANCHES: dict[str, Callable[[Hybrid, Site], Branch]] = {
    "compress": CompressBranch,
    "select": SelectBranch,
    "window": WindowBranch,
}


def _last(count: int, context: int) -> float:
    """How many of the last `count` tokens there are on average."""
    count = min(count, context)
    return count - count * (count - 1) / (2 * context)


class HybridCache:
    """What each branch remembers; which tokens there were is counted once."""

    def __init__(self, parts: dict[str, Any], counted: Append):
        self.parts = parts
        self.counted = counted

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens absorbed per row."""
        return self.counted.lengths

    def count(self, segments_BT: Tensor | None, x: Tensor) -> tuple[Reach, int]:
        """Take in the tokens of a call; what they see of all tokens, and how many those are."""
        (held,), seen = self.counted.append(segments_BT, x[..., :0])
        return seen, held.shape[1]

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows."""
        for part in (*self.parts.values(), self.counted):
            part.select(rows)

    def truncate(self, lengths: Tensor) -> None:
        """Forget the newest tokens; possible while no window and no block has dropped any."""
        parts = (*self.parts.values(), self.counted)
        for part in parts:
            part.check_rewind(lengths)
        for part in parts:
            part.truncate(lengths)

    def join(self, other: "HybridCache") -> None:
        """Append the rows of another cache."""
        for name, part in self.parts.items():
            part.join(other.parts[name])
        self.counted.join(other.counted)

    def nbytes(self) -> int:
        """All of it."""
        return sum(part.nbytes() for part in self.parts.values())

"""Low-rank queries, keys and values of multi-head latent attention (MLA; DeepSeek-V2, 2405.04434,
section 2.1).

    c_t = norm(W_DKV x_t)    k_t = [W_UK c_t, rotate(W_KR x_t)]    v_t = W_UV c_t

All heads share the rotated part of a key. A cache holds c_t and this part only.

*Absorbed* attention moves the up-projections out of the sum over keys: with q' = W_UK^T q the score
is q'.c_s, and W_UV is applied once, to the weighted sum of latents. All heads then share one key
[c_s, k^R_s] and one value c_s, and no key or value is expanded.

Legend: B rows, T tokens, S keys, H heads, N part of a head without rotation (NoPE), R rotated part
(RoPE), C latent, V value width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinsmith.core.parse import Size
from tinsmith.nn.attention.rope import apply_rotary_emb
from tinsmith.nn.contract import MixerConfigBase, Rotary
from tinsmith.nn.layers.norm import RMSNorm

EPS = 1e-6
"""Epsilon of the norms of latents. DeepSeek's value, independent of the model's `norm_eps`."""


@dataclass(frozen=True, kw_only=True)
class LatentHeads(MixerConfigBase):
    """Sizes of multi-head latent attention; the defaults are Tiny-R2's."""

    heads: Size = 8
    kv_rank: Size = 32
    q_rank: Size | None = 96  # null: no latent, queries are projected from x
    nope_dim: Size = 32
    rope_dim: Size = 64
    v_dim: Size = 32

    def __post_init__(self) -> None:
        for name in ("heads", "kv_rank", "q_rank", "nope_dim", "rope_dim", "v_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim={self.rope_dim} must be even to be rotated")

    def build_queries(self, dim: int) -> "LatentQueries | DirectQueries":
        """Build the query projection at model width `dim`."""
        if self.q_rank is None:
            return DirectQueries(dim, self.heads, self.nope_dim, self.rope_dim)
        return LatentQueries(dim, self.heads, self.q_rank, self.nope_dim, self.rope_dim)

    def query_input_dim(self, dim: int) -> int:
        """Return the width of the input of the query up-projection."""
        return dim if self.q_rank is None else self.q_rank

    def build_keys(self, dim: int) -> "LatentKeys":
        """Build the projections to latents, and from latents to keys and values."""
        widths = (self.nope_dim, self.rope_dim, self.v_dim)
        return LatentKeys(dim, self.heads, self.kv_rank, *widths)

    def prefer_absorbed(self, queries: int) -> bool:
        """Return True if absorbed attention of so many queries costs fewer products than expanding
        every latent, per key and head.
        """
        expanded = self.nope_dim + self.v_dim
        return queries * (2 * self.kv_rank - expanded) <= self.kv_rank * expanded

    @property
    def pair_flops(self) -> int:
        """Return the operations of one query and one key, in all heads."""
        return 2 * self.heads * (self.nope_dim + self.rope_dim + self.v_dim)


class LatentQueries(nn.Module):
    """Projects x to a latent of width `rank`, and the latent to queries."""

    def __init__(self, dim: int, heads: int, rank: int, nope_dim: int, rope_dim: int):
        super().__init__()
        self.heads, self.widths = heads, (nope_dim, rope_dim)
        self.down = nn.Linear(dim, rank, bias=False)
        self.norm = RMSNorm(rank, EPS)
        self.up = nn.Linear(rank, heads * sum(self.widths), bias=False)

    def forward(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parts (B, T, H, N) and (B, T, H, R, rotated) of queries, and the latent."""
        latent = self.norm(self.down(x))
        return *_split_and_rotate(self.up(latent), self.heads, self.widths, rotary), latent


class DirectQueries(nn.Module):
    """Projects x to queries without a latent (DeepSeek-V2-Lite)."""

    def __init__(self, dim: int, heads: int, nope_dim: int, rope_dim: int):
        super().__init__()
        self.heads, self.widths = heads, (nope_dim, rope_dim)
        self.straight = nn.Linear(dim, heads * sum(self.widths), bias=False)

    def forward(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same as `LatentQueries`, with x instead of the latent."""
        return *_split_and_rotate(self.straight(x), self.heads, self.widths, rotary), x


def _split_and_rotate(
    flat: Tensor, heads: int, widths: tuple[int, int], rotary: Rotary | None
) -> tuple[Tensor, Tensor]:
    nope_BTHN, rope_BTHR = flat.unflatten(-1, (heads, sum(widths))).split(widths, -1)
    return nope_BTHN, rope_BTHR if rotary is None else apply_rotary_emb(rope_BTHR, rotary)


class LatentKeys(nn.Module):
    """Projects x to latents and rotated keys, and these to keys and values or to the equivalent
    absorbed attention.
    """

    def __init__(self, dim: int, heads: int, rank: int, nope_dim: int, rope_dim: int, v_dim: int):
        super().__init__()
        self.heads, self.split, self.widths = heads, (rank, rope_dim), (nope_dim, v_dim)
        self.down = nn.Linear(dim, rank + rope_dim, bias=False)
        self.norm = RMSNorm(rank, EPS)
        self.up = nn.Linear(rank, heads * sum(self.widths), bias=False)

    def forward(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """Return latents (B, T, C) and rotated keys (B, T, R) of x (B, T, D)."""
        latent_BTC, rope_BTR = self.down(x).split(self.split, -1)
        if rotary is not None:
            rope_BTR = apply_rotary_emb(rope_BTR[:, :, None], rotary)[:, :, 0]
        return self.norm(latent_BTC), rope_BTR

    def expand(self, latent_BSC: Tensor, rope_BSR: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys (B, S, H, N + R) and values (B, S, H, V) of every head."""
        expanded = self.up(latent_BSC).unflatten(-1, (self.heads, sum(self.widths)))
        nope_BSHN, v_BSHV = expanded.split(self.widths, -1)
        rope_BSHR = rope_BSR[:, :, None].expand(-1, -1, self.heads, -1)
        return torch.cat((nope_BSHN, rope_BSHR), -1), v_BSHV

    def absorb_queries(self, nope_BTHN: Tensor, rope_BTHR: Tensor) -> Tensor:
        """Return queries (B, T, H, C + R) whose keys are [latent, rotated key].

        Attention divides scores by the root of the width of its queries. The returned queries are
        wider than the original ones, so they are scaled to compensate.
        """
        nope_BTHC = torch.einsum("bthn,hnc->bthc", nope_BTHN, self._by_head()[0])
        q_BTHD = torch.cat((nope_BTHC, rope_BTHR), -1)
        return q_BTHD * math.sqrt(q_BTHD.shape[-1] / (nope_BTHN.shape[-1] + rope_BTHR.shape[-1]))

    def project_values(self, mixed_BTHC: Tensor) -> Tensor:
        """Return the weighted sums of values (B, T, H, V) from those of latents (B, T, H, C)."""
        return torch.einsum("bthc,hvc->bthv", mixed_BTHC, self._by_head()[1])

    def _by_head(self) -> tuple[Tensor, ...]:
        """Return W_UK (H, N, C) and W_UV (H, V, C)."""
        return self.up.weight.unflatten(0, (self.heads, sum(self.widths))).split(self.widths, 1)


def linear_flops(module: nn.Module) -> int:
    """Return the operations of one token in all linear layers of a module."""
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))

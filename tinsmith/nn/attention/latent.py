"""Keys, values and queries that pass through a narrow latent: the parts of multi-head latent
attention (DeepSeek-V2, 2405.04434, section 2.1).

    c_t = norm(W_DKV x_t)    k_t = [W_UK c_t, turned(W_KR x_t)]    v_t = W_UV c_t

The turned part of a key is one for all heads. Only c_t and it need to be remembered.

*Absorbed*, the up-projection moves to the other side of the products: with q' = W_UK^T q the score
is q'.c_s, and W_UV is applied once, to the weighted sum of latents. Then all heads share one key
[c_s, k^R_s] and one value c_s: no key or value is ever expanded.

Legend: B rows, T tokens, S keys, H heads, N un-turned part of a head, R turned part, C latent, V
value width.
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
"""Of the norms of latents, whatever that of the stream: DeepSeek's."""


@dataclass(frozen=True, kw_only=True)
class LatentHeads(MixerConfigBase):
    """Sizes of a mixer whose queries, keys and values are made of latents; the defaults are
    Tiny-R2's.
    """

    heads: Size = 8
    kv_rank: Size = 32
    q_rank: Size | None = 96  # null: queries straight from x
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
        """What makes queries, at model width `dim`."""
        if self.q_rank is None:
            return DirectQueries(dim, self.heads, self.nope_dim, self.rope_dim)
        return LatentQueries(dim, self.heads, self.q_rank, self.nope_dim, self.rope_dim)

    def query_input_dim(self, dim: int) -> int:
        """The width of what queries are made of."""
        return dim if self.q_rank is None else self.q_rank

    def build_keys(self, dim: int) -> "LatentKeys":
        """What makes latents, and keys and values of them."""
        widths = (self.nope_dim, self.rope_dim, self.v_dim)
        return LatentKeys(dim, self.heads, self.kv_rank, *widths)

    def prefer_absorbed(self, queries: int) -> bool:
        """Whether products of so many queries with latents cost less than expanding every latent,
        per key and head.
        """
        both = self.nope_dim + self.v_dim
        return queries * (2 * self.kv_rank - both) <= self.kv_rank * both

    @property
    def pair_flops(self) -> int:
        """Of one query and one key, in all heads."""
        return 2 * self.heads * (self.nope_dim + self.rope_dim + self.v_dim)


class LatentQueries(nn.Module):
    """Queries of `heads` heads, made of a latent of `rank` numbers."""

    def __init__(self, dim: int, heads: int, rank: int, nope_dim: int, rope_dim: int):
        super().__init__()
        self.heads, self.widths = heads, (nope_dim, rope_dim)
        self.down = nn.Linear(dim, rank, bias=False)
        self.norm = RMSNorm(rank, EPS)
        self.up = nn.Linear(rank, heads * sum(self.widths), bias=False)

    def forward(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> (B, T, H, N), turned (B, T, H, R), and what they are made of."""
        latent = self.norm(self.down(x))
        return *_turned(self.up(latent), self.heads, self.widths, rotary), latent


class DirectQueries(nn.Module):
    """Queries made of x itself (DeepSeek-V2-Lite)."""

    def __init__(self, dim: int, heads: int, nope_dim: int, rope_dim: int):
        super().__init__()
        self.heads, self.widths = heads, (nope_dim, rope_dim)
        self.straight = nn.Linear(dim, heads * sum(self.widths), bias=False)

    def forward(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Project queries, as `LatentQueries` does."""
        return *_turned(self.straight(x), self.heads, self.widths, rotary), x


def _turned(
    flat: Tensor, heads: int, widths: tuple[int, int], rotary: Rotary | None
) -> tuple[Tensor, Tensor]:
    nope_BTHN, rope_BTHR = flat.unflatten(-1, (heads, sum(widths))).split(widths, -1)
    return nope_BTHN, rope_BTHR if rotary is None else apply_rotary_emb(rope_BTHR, rotary)


class LatentKeys(nn.Module):
    """What is remembered of a token, and the two ways to attend to it."""

    def __init__(self, dim: int, heads: int, rank: int, nope_dim: int, rope_dim: int, v_dim: int):
        super().__init__()
        self.heads, self.split, self.widths = heads, (rank, rope_dim), (nope_dim, v_dim)
        self.down = nn.Linear(dim, rank + rope_dim, bias=False)
        self.norm = RMSNorm(rank, EPS)
        self.up = nn.Linear(rank, heads * sum(self.widths), bias=False)

    def forward(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> latents (B, T, C) and turned keys (B, T, R)."""
        latent_BTC, rope_BTR = self.down(x).split(self.split, -1)
        if rotary is not None:
            rope_BTR = apply_rotary_emb(rope_BTR[:, :, None], rotary)[:, :, 0]
        return self.norm(latent_BTC), rope_BTR

    def expand(self, latent_BSC: Tensor, rope_BSR: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, S, H, N + R) and values (B, S, H, V) of every head."""
        both = self.up(latent_BSC).unflatten(-1, (self.heads, sum(self.widths)))
        nope_BSHN, v_BSHV = both.split(self.widths, -1)
        rope_BSHR = rope_BSR[:, :, None].expand(-1, -1, self.heads, -1)
        return torch.cat((nope_BSHN, rope_BSHR), -1), v_BSHV

    def absorb_queries(self, nope_BTHN: Tensor, rope_BTHR: Tensor) -> Tensor:
        """Queries that meet [latent, turned key] instead of keys: (B, T, H, C + R).

        Attention divides by the root of the width of its queries, which is another one here: that
        is made up for.
        """
        nope_BTHC = torch.einsum("bthn,hnc->bthc", nope_BTHN, self._by_head()[0])
        q_BTHD = torch.cat((nope_BTHC, rope_BTHR), -1)
        return q_BTHD * math.sqrt(q_BTHD.shape[-1] / (nope_BTHN.shape[-1] + rope_BTHR.shape[-1]))

    def project_values(self, mixed_BTHC: Tensor) -> Tensor:
        """Weighted sums of latents -> those of values (B, T, H, V)."""
        return torch.einsum("bthc,hvc->bthv", mixed_BTHC, self._by_head()[1])

    def _by_head(self) -> tuple[Tensor, ...]:
        """W_UK (H, N, C) and W_UV (H, V, C)."""
        return self.up.weight.unflatten(0, (self.heads, sum(self.widths))).split(self.widths, 1)


def linear_flops(module: nn.Module) -> int:
    """Of one token through every linear layer in it."""
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))

"""The lightning indexer of DeepSeek Sparse Attention (DeepSeek-V3.2, 2512.02556, equation 1): which
earlier tokens are worth attending to.

    I_ts = sum_j w_tj relu(q_tj . k_s) / sqrt(J E)      few narrow heads j, one key for all of them

Its choice is discrete, so it learns from a loss of its own: the divergence of softmax_s(I_ts) from
the attention that it stands in for, summed over heads. Its inputs are detached: no other loss
reaches it, and its own reaches nothing else. Scores are at least float32, whatever autocast says.

Legend: B rows, T tokens, S keys, J index heads, E their width, H heads, G key heads, D head width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.nn.contract import Rotary
from tinsmith.nn.parts.norm import LayerNorm, exactly, wide
from tinsmith.nn.parts.rope import rotate

EPS = 1e-6


class Index(NamedTuple):
    """What tokens ask for, and what they are found by."""

    q_BTJE: Tensor
    weight_BTJ: Tensor
    k_BSE: Tensor


class Indexer(nn.Module):
    """Queries come from what the attention's queries are made of, `source` wide; keys and weights
    from x.
    """

    def __init__(self, dim: int, source: int, heads: int, width: int):
        super().__init__()
        self.heads, self.width = heads, width
        self.q_up = nn.Linear(source, heads * width, bias=False)
        self.k_down = nn.Linear(dim, width, bias=False)
        self.k_norm = LayerNorm(width, EPS)
        self.weigh = nn.Linear(dim, heads, bias=False)

    def forward(self, x: Tensor, latent: Tensor, rotary: Rotary | None) -> Index:
        """x (B, T, D), latent (B, T, source), tables of the attention's turned part."""
        x, latent = x.detach(), latent.detach()
        q_BTJE = self.q_up(latent).unflatten(-1, (self.heads, self.width))
        k_BTE = self.k_norm(self.k_down(x))
        if rotary is not None:
            q_BTJE = _turned(q_BTJE, rotary)
            k_BTE = _turned(k_BTE[:, :, None], rotary)[:, :, 0]
        return Index(q_BTJE, self.weigh(x) / math.sqrt(self.heads * self.width), k_BTE)


def _turned(x_BTJE: Tensor, rotary: Rotary) -> Tensor:
    """The first R numbers are turned; where a head is narrower than that, all of it, by every n-th
    of the angles, which are those of a table of its own width.
    """
    wanted, width = rotary[0].shape[-1], x_BTJE.shape[-1]
    if width < wanted:
        cos, sin = (table[..., :: wanted // width] for table in rotary)
        return rotate(x_BTJE, (cos, sin))
    return torch.cat((rotate(x_BTJE[..., :wanted], rotary), x_BTJE[..., wanted:]), -1)


def scores(index: Index) -> Tensor:
    """I, (B, T, S), at least float32."""
    kind = wide(index.q_BTJE.dtype)
    with exactly(index.q_BTJE.device):
        products = torch.einsum("btje,bse->btjs", index.q_BTJE.to(kind), index.k_BSE.to(kind))
        return torch.einsum("btj,btjs->bts", index.weight_BTJ.to(kind), products.relu())


@torch.no_grad()
def target(q_BTHD: Tensor, k_BSGD: Tensor, visible_BTS: Tensor) -> Tensor:
    """What the indexer is to say, (B, T, S): attention over all visible keys, the mean of heads."""
    kind, share = wide(q_BTHD.dtype), q_BTHD.shape[2] // k_BSGD.shape[2]
    with exactly(q_BTHD.device):
        q_BTGJD = q_BTHD.to(kind).unflatten(2, (-1, share))
        logits = torch.einsum("btgjd,bsgd->btgjs", q_BTGJD, k_BSGD.to(kind))
    logits = logits / math.sqrt(q_BTHD.shape[-1])
    return logits.masked_fill(~visible_BTS[:, :, None, None], -math.inf).softmax(-1).mean((2, 3))


def divergence(target_BTS: Tensor, scores_BTS: Tensor, visible_BTS: Tensor) -> Tensor:
    """(B, T): KL(target || softmax of the visible scores), where `target` is 0 out of sight."""
    said = scores_BTS.masked_fill(~visible_BTS, -math.inf).log_softmax(-1)
    return F.kl_div(said.masked_fill(~visible_BTS, 0.0), target_BTS, reduction="none").sum(-1)


def check_index(index_heads: int, index_dim: int, rope_dim: int, keep: int) -> None:
    """ValueError where an indexer cannot be built."""
    for name, value in (("index_heads", index_heads), ("index_dim", index_dim), ("keep", keep)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if index_dim < rope_dim and (rope_dim % index_dim or index_dim % 2):
        raise ValueError(f"index_dim={index_dim} must be even and divide rope_dim={rope_dim}")

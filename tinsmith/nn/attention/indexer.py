"""The lightning indexer of DeepSeek Sparse Attention (DeepSeek-V3.2, 2512.02556, equation 1): which
earlier tokens are worth attending to.

    I_ts = sum_j w_tj relu(q_tj . k_s) / sqrt(J E)      few narrow heads j, one key for all of them

Its choice is discrete, so it learns from a loss of its own: the divergence of softmax_s(I_ts) from
the attention that it stands in for, summed over heads. Its inputs are detached: no other loss
reaches it, and its own reaches nothing else. Scores are at least float32, whatever autocast says.

Legend: B rows, T tokens, S keys, J index heads, E their width, H heads, G key heads, D head width.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tinsmith.core.parse import Size
from tinsmith.nn.attention.latent import LatentHeads
from tinsmith.nn.attention.rope import apply_rotary_emb
from tinsmith.nn.contract import Rotary
from tinsmith.nn.layers.norm import LayerNorm
from tinsmith.nn.precision import at_least_fp32, no_autocast

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class IndexedHeads(LatentHeads):
    """Sizes of a mixer whose latent queries attend to the tokens that an indexer chooses."""

    index_topk: Size = 64
    index_heads: Size = 4
    index_dim: Size = 32
    index_weight: float = 1.0
    index_target: Literal["dense", "selected"] = "dense"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("index_heads", "index_dim", "index_topk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        width, turned = self.index_dim, self.rope_dim
        if width < turned and (turned % width or width % 2):
            raise ValueError(f"index_dim={width} must be even and divide rope_dim={turned}")
        if not self.index_weight >= 0:
            raise ValueError(f"index_weight={self.index_weight} must be at least 0")

    def build_indexer(self, dim: int) -> "Indexer":
        """What scores earlier tokens, at model width `dim`."""
        return Indexer(dim, self.query_input_dim(dim), self.index_heads, self.index_dim)


class IndexerOutput(NamedTuple):
    """What tokens ask for, and what they are found by."""

    q_BTJE: Tensor
    weight_BTJ: Tensor
    k_BSE: Tensor

    def narrow(self, queries: slice, keys: int) -> "IndexerOutput":
        """The same for some of the queries, and the first so many keys."""
        return IndexerOutput(
            self.q_BTJE[:, queries], self.weight_BTJ[:, queries], self.k_BSE[:, :keys]
        )


class Indexer(nn.Module):
    """Queries come from what the attention's queries are made of, `source` wide; keys and weights
    from x.
    """

    def __init__(self, dim: int, query_input_dim: int, heads: int, width: int):
        super().__init__()
        self.heads, self.width = heads, width
        self.q_up = nn.Linear(query_input_dim, heads * width, bias=False)
        self.k_down = nn.Linear(dim, width, bias=False)
        self.k_norm = LayerNorm(width, EPS)
        self.weigh = nn.Linear(dim, heads, bias=False)

    def forward(self, x: Tensor, query_input: Tensor, rotary: Rotary | None) -> IndexerOutput:
        """x (B, T, D), latent (B, T, source), tables of the attention's turned part."""
        x, query_input = x.detach(), query_input.detach()
        q_BTJE = self.q_up(query_input).unflatten(-1, (self.heads, self.width))
        k_BTE = self.k_norm(self.k_down(x))
        if rotary is not None:
            q_BTJE = _turned(q_BTJE, rotary)
            k_BTE = _turned(k_BTE[:, :, None], rotary)[:, :, 0]
        return IndexerOutput(q_BTJE, self.weigh(x) / math.sqrt(self.heads * self.width), k_BTE)


def _turned(x_BTJE: Tensor, rotary: Rotary) -> Tensor:
    """The first R numbers are turned; where a head is narrower than that, all of it, by every n-th
    of the angles, which are those of a table of its own width.
    """
    wanted, width = rotary[0].shape[-1], x_BTJE.shape[-1]
    if width < wanted:
        cos, sin = (table[..., :: wanted // width] for table in rotary)
        return apply_rotary_emb(x_BTJE, (cos, sin))
    return torch.cat((apply_rotary_emb(x_BTJE[..., :wanted], rotary), x_BTJE[..., wanted:]), -1)


@torch.no_grad()
def index_scores(index: IndexerOutput) -> Tensor:
    """I, (B, T, S), at least float32."""
    with no_autocast(index.q_BTJE.device):
        return _scores(*_wide(index))[1]


@torch.no_grad()
def target_attention(q_BTHD: Tensor, k_BSGD: Tensor, visible_BTS: Tensor) -> Tensor:
    """What the indexer is to say, (B, T, S): attention over all visible keys, the mean of heads."""
    kind, count = at_least_fp32(q_BTHD.dtype), q_BTHD.shape[1]
    scaled_BTHD = q_BTHD.to(kind) / math.sqrt(q_BTHD.shape[-1])
    q_BGTJD = scaled_BTHD.unflatten(2, (k_BSGD.shape[2], -1)).transpose(1, 2)
    with no_autocast(q_BTHD.device):
        logits = q_BGTJD.flatten(2, 3) @ k_BSGD.to(kind).permute(0, 2, 3, 1)
    logits_BGTJS = logits.unflatten(2, (count, -1))
    hidden = torch.zeros_like(visible_BTS, dtype=kind).masked_fill_(~visible_BTS, -math.inf)
    return logits_BGTJS.add_(hidden[:, None, :, None]).softmax(-1).mean((1, 3))


class IndexerKL:
    """The sum over counted tokens of KL(target || softmax of the visible scores), chunk by chunk of
    the queries, at least float32.

    The gradient is formed along with the sum, in three tensors of the index's own shapes, so that
    nothing of (B, T, S) is kept and memory grows with T: d/dI_ts = softmax_s(I_ts) - target_ts, and
    from there through the weights and the relu.
    """

    def __init__(self, index: IndexerOutput):
        self.index, kind = index, at_least_fp32(index.q_BTJE.dtype)
        self._slopes = IndexerOutput(*(torch.zeros_like(tensor, dtype=kind) for tensor in index))
        self._lost = index.q_BTJE.new_zeros((), dtype=kind)

    @torch.no_grad()
    def add(self, part: slice, target_BCN: Tensor, visible_BCN: Tensor, counted_BC: Tensor) -> None:
        """Some of the queries, and the first N keys; `target` is 0 out of sight."""
        keys = target_BCN.shape[-1]
        q, weight, k = _wide(self.index.narrow(part, keys))
        with no_autocast(q.device):
            fired_BCJN, scores_BCN = _scores(q, weight, k)
            output_BCN = scores_BCN.masked_fill_(~visible_BCN, -math.inf).log_softmax(-1)
            lost_BCN = target_BCN * (target_BCN.log() - output_BCN)
            lost_BC = lost_BCN.masked_fill_(target_BCN == 0, 0.0).sum(-1)
            self._lost += (lost_BC * counted_BC).sum()
            slope_BCN = (output_BCN.exp_() - target_BCN) * counted_BC[..., None]
            self._slopes.weight_BTJ[:, part] = (fired_BCJN @ slope_BCN[..., None]).squeeze(-1)
            slope_BCJN = (weight[..., None] * slope_BCN[:, :, None]).mul_(fired_BCJN > 0)
            slope_BXN = slope_BCJN.flatten(1, 2)
            self._slopes.q_BTJE[:, part] = (slope_BXN @ k).view_as(q)
            self._slopes.k_BSE[:, :keys] += slope_BXN.mT @ q.flatten(1, 2)

    def sum(self) -> Tensor:
        """Of all chunks, with its gradient; ends the adding."""
        return _Sum.apply(self._lost, *self._slopes, *self.index)  # type: ignore[return-value]


def _wide(index: IndexerOutput) -> tuple[Tensor, Tensor, Tensor]:
    kind = at_least_fp32(index.q_BTJE.dtype)
    return index.q_BTJE.to(kind), index.weight_BTJ.to(kind), index.k_BSE.to(kind)


def _scores(q_BTJE: Tensor, weight_BTJ: Tensor, k_BSE: Tensor) -> tuple[Tensor, Tensor]:
    """relu(q . k), (B, T, J, S), and its weighted sum, (B, T, S)."""
    fired_BTJS = (q_BTJE.flatten(1, 2) @ k_BSE.mT).relu_().unflatten(1, q_BTJE.shape[1:3])
    return fired_BTJS, (weight_BTJ[:, :, None] @ fired_BTJS).squeeze(2)


class _Sum(torch.autograd.Function):
    """A number whose gradient is known: (number, slopes, what they are slopes of)."""

    @staticmethod
    def forward(
        ctx: Any, lost: Tensor, dq: Tensor, dweight: Tensor, dk: Tensor, *index: Tensor
    ) -> Tensor:
        grads = zip((dq, dweight, dk), index, strict=True)
        ctx.save_for_backward(*(grad.to(of.dtype) for grad, of in grads))
        return lost.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        slopes = (grad * upstream[0].to(grad.dtype) for grad in ctx.saved_tensors)
        return None, None, None, None, *slopes

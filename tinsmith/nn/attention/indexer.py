"""The lightning indexer of DeepSeek Sparse Attention (DeepSeek-V3.2, 2512.02556, equation 1). It
scores all earlier tokens, and attention uses those with the highest scores.

    I_ts = sum_j w_tj relu(q_tj . k_s) / sqrt(J E)      few narrow heads j, one key for all of them

Selection has no gradient, so the indexer is trained by its own loss: the KL divergence of
softmax_s(I_ts) from the mean attention of the heads. Its inputs are detached, so other losses do
not train it, and its own loss trains nothing else. Scores are at least float32, also under
autocast.

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
    """Sizes of a mixer whose latent queries attend to the tokens that an indexer selects."""

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
        width, rotated = self.index_dim, self.rope_dim
        if width < rotated and (rotated % width or width % 2):
            raise ValueError(f"index_dim={width} must be even and divide rope_dim={rotated}")
        if not self.index_weight >= 0:
            raise ValueError(f"index_weight={self.index_weight} must be at least 0")

    def build_indexer(self, dim: int) -> "Indexer":
        """Build the indexer at model width `dim`."""
        return Indexer(dim, self.query_input_dim(dim), self.index_heads, self.index_dim)


class IndexerOutput(NamedTuple):
    """Queries, head weights and keys of the indexer."""

    q_BTJE: Tensor
    weight_BTJ: Tensor
    k_BSE: Tensor

    def narrow(self, queries: slice, keys: int) -> "IndexerOutput":
        """Return the same for some of the queries and the first `keys` keys."""
        return IndexerOutput(
            self.q_BTJE[:, queries], self.weight_BTJ[:, queries], self.k_BSE[:, :keys]
        )


class Indexer(nn.Module):
    """Projects the input of the attention's queries to index queries, and x to index keys and head
    weights.
    """

    def __init__(self, dim: int, query_input_dim: int, heads: int, width: int):
        super().__init__()
        self.heads, self.width = heads, width
        self.q_up = nn.Linear(query_input_dim, heads * width, bias=False)
        self.k_down = nn.Linear(dim, width, bias=False)
        self.k_norm = LayerNorm(width, EPS)
        self.weigh = nn.Linear(dim, heads, bias=False)

    def forward(self, x: Tensor, query_input: Tensor, rotary: Rotary | None) -> IndexerOutput:
        """Return the projections of x (B, T, D) and of the query input (B, T, query_input_dim).
        `rotary` are the tables of the attention's rotated part.
        """
        x, query_input = x.detach(), query_input.detach()
        q_BTJE = self.q_up(query_input).unflatten(-1, (self.heads, self.width))
        k_BTE = self.k_norm(self.k_down(x))
        if rotary is not None:
            q_BTJE = _rotate_index_heads(q_BTJE, rotary)
            k_BTE = _rotate_index_heads(k_BTE[:, :, None], rotary)[:, :, 0]
        return IndexerOutput(q_BTJE, self.weigh(x) / math.sqrt(self.heads * self.width), k_BTE)


def _rotate_index_heads(x_BTJE: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the first R numbers of each head. A narrower head is rotated as a whole by every n-th
    angle, which are the angles of a table of its own width.
    """
    rope_dim, width = rotary[0].shape[-1], x_BTJE.shape[-1]
    if width < rope_dim:
        cos, sin = (table[..., :: rope_dim // width] for table in rotary)
        return apply_rotary_emb(x_BTJE, (cos, sin))
    return torch.cat((apply_rotary_emb(x_BTJE[..., :rope_dim], rotary), x_BTJE[..., rope_dim:]), -1)


@torch.no_grad()
def index_scores(index: IndexerOutput) -> Tensor:
    """Return the scores I (B, T, S), at least float32."""
    with no_autocast(index.q_BTJE.device):
        return _scores(*_wide(index))[1]


@torch.no_grad()
def target_attention(q_BTHD: Tensor, k_BSGD: Tensor, visible_BTS: Tensor) -> Tensor:
    """Return the indexer's target (B, T, S): attention over all visible keys, the mean of heads."""
    kind, count = at_least_fp32(q_BTHD.dtype), q_BTHD.shape[1]
    scaled_BTHD = q_BTHD.to(kind) / math.sqrt(q_BTHD.shape[-1])
    q_BGTJD = scaled_BTHD.unflatten(2, (k_BSGD.shape[2], -1)).transpose(1, 2)
    with no_autocast(q_BTHD.device):
        logits = q_BGTJD.flatten(2, 3) @ k_BSGD.to(kind).permute(0, 2, 3, 1)
    logits_BGTJS = logits.unflatten(2, (count, -1))
    hidden = torch.zeros_like(visible_BTS, dtype=kind).masked_fill_(~visible_BTS, -math.inf)
    return logits_BGTJS.add_(hidden[:, None, :, None]).softmax(-1).mean((1, 3))


class IndexerKL:
    """Sums KL(target || softmax of the visible scores) over tokens without padding, in chunks of
    queries, at least float32.

    The gradient is computed together with the sum and stored in three tensors of the shapes of
    `IndexerOutput`. No (B, T, S) tensor is stored, so memory is linear in T. d/dI_ts =
    softmax_s(I_ts) - target_ts, which is propagated through the head weights and the relu.
    """

    def __init__(self, index: IndexerOutput):
        self.index, kind = index, at_least_fp32(index.q_BTJE.dtype)
        self._slopes = IndexerOutput(*(torch.zeros_like(tensor, dtype=kind) for tensor in index))
        self._loss = index.q_BTJE.new_zeros((), dtype=kind)

    @torch.no_grad()
    def add(self, part: slice, target_BCN: Tensor, visible_BCN: Tensor, counted_BC: Tensor) -> None:
        """Add a chunk of queries with the first N keys; `target` is 0 where it is not visible."""
        keys = target_BCN.shape[-1]
        q, weight, k = _wide(self.index.narrow(part, keys))
        with no_autocast(q.device):
            relu_BCJN, scores_BCN = _scores(q, weight, k)
            output_BCN = scores_BCN.masked_fill_(~visible_BCN, -math.inf).log_softmax(-1)
            kl_BCN = target_BCN * (target_BCN.log() - output_BCN)
            kl_BC = kl_BCN.masked_fill_(target_BCN == 0, 0.0).sum(-1)
            self._loss += (kl_BC * counted_BC).sum()
            slope_BCN = (output_BCN.exp_() - target_BCN) * counted_BC[..., None]
            self._slopes.weight_BTJ[:, part] = (relu_BCJN @ slope_BCN[..., None]).squeeze(-1)
            slope_BCJN = (weight[..., None] * slope_BCN[:, :, None]).mul_(relu_BCJN > 0)
            slope_BXN = slope_BCJN.flatten(1, 2)
            self._slopes.q_BTJE[:, part] = (slope_BXN @ k).view_as(q)
            self._slopes.k_BSE[:, :keys] += slope_BXN.mT @ q.flatten(1, 2)

    def sum(self) -> Tensor:
        """Return the sum of all chunks with its gradient. Call it once, after the last `add`."""
        return _Sum.apply(self._loss, *self._slopes, *self.index)  # type: ignore[return-value]


def _wide(index: IndexerOutput) -> tuple[Tensor, Tensor, Tensor]:
    kind = at_least_fp32(index.q_BTJE.dtype)
    return index.q_BTJE.to(kind), index.weight_BTJ.to(kind), index.k_BSE.to(kind)


def _scores(q_BTJE: Tensor, weight_BTJ: Tensor, k_BSE: Tensor) -> tuple[Tensor, Tensor]:
    """Return relu(q . k) (B, T, J, S) and its weighted sum (B, T, S)."""
    relu_BTJS = (q_BTJE.flatten(1, 2) @ k_BSE.mT).relu_().unflatten(1, q_BTJE.shape[1:3])
    return relu_BTJS, (weight_BTJ[:, :, None] @ relu_BTJS).squeeze(2)


class _Sum(torch.autograd.Function):
    """Returns a loss with a precomputed gradient: (loss, gradients, the tensors they belong to)."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, dq: Tensor, dweight: Tensor, dk: Tensor, *index: Tensor
    ) -> Tensor:
        grads = zip((dq, dweight, dk), index, strict=True)
        ctx.save_for_backward(*(grad.to(of.dtype) for grad, of in grads))
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        slopes = (grad * upstream[0].to(grad.dtype) for grad in ctx.saved_tensors)
        return None, None, None, None, *slopes

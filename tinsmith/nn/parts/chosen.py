"""Attention over the `keep` tokens that an indexer chooses for each query, the same for all heads.

Queries go in chunks, so that (queries x keys) is never held whole; what a chunk needs is computed
again for its gradient. A chunk gathers the chosen keys and values, or masks all others where those
are few; its naive twin writes that out.

Legend: B rows, T queries, S keys, C queries of a chunk, K chosen, H heads, G key heads, J = H / G,
D width of queries and keys, E width of values.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tinsmith.nn.parts.attend import Reach
from tinsmith.nn.parts.choose import top
from tinsmith.nn.parts.indexer import Index, divergence, scores, target
from tinsmith.nn.parts.norm import wide

Target = Literal["dense", "selected"]


class Choice(NamedTuple):
    """How tokens are chosen, and what the indexer learns from."""

    keep: int
    learns: Target | None
    """None: nothing, outside of training."""
    kind: str = "sdpa"
    dropout: float = 0.0


class Chosen(NamedTuple):
    """Which keys each query of a chunk attends to."""

    index_BCK: Tensor
    seen_BCS: Tensor
    """Where fewer than `keep` are in sight, some of the chosen are not."""
    dropout: float

    @property
    def mask_BCS(self) -> Tensor:
        """Chosen and in sight."""
        none = torch.zeros_like(self.seen_BCS)
        return none.scatter(-1, self.index_BCK, True) & self.seen_BCS


def attend_chosen(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, index: Index, seen: Reach, choice: Choice
) -> tuple[Tensor, Tensor | None]:
    """Attention (B, T, H, E), and the indexer's divergence of every query (B, T) where it learns.

    `seen` is of keys in order of places.
    """
    k_BSGD, v_BSGE = k_BSGD.to(q_BTHD.dtype), v_BSGE.to(q_BTHD.dtype)
    queries, keys = q_BTHD.shape[1], k_BSGD.shape[1]
    whole = seen.spelled(len(q_BTHD), queries, keys, q_BTHD.device)
    step = _queries_at_once(keys)
    run = _again if torch.is_grad_enabled() and queries > step else _once
    said = [
        run(_chunk, part, q_BTHD, k_BSGD, v_BSGE, index, whole, choice)
        for part in (slice(begin, begin + step) for begin in range(0, max(queries, 1), step))
    ]
    lost = None if choice.learns is None else torch.cat([each for _, each in said], 1)
    return torch.cat([y for y, _ in said], 1), lost


def _queries_at_once(keys: int) -> int:
    """By the number of keys alone, so that other rows change no bit of one."""
    return min(max(2**22 // max(keys, 1), 16), 256)


def _once(work: Callable, *arguments: object) -> tuple[Tensor, Tensor]:
    return work(*arguments)


def _again(work: Callable, *arguments: object) -> tuple[Tensor, Tensor]:
    return checkpoint(work, *arguments, use_reentrant=False)  # type: ignore[return-value]


def _chunk(
    part: slice,
    q: Tensor,
    k_BSGD: Tensor,
    v_BSGE: Tensor,
    index: Index,
    seen: Reach,
    choice: Choice,
) -> tuple[Tensor, Tensor]:
    q_BCHD = q[:, part]
    here = Reach(*(end if end is None else end[:, part] for end in seen[:2]))
    visible_BCS = here.visible(q_BCHD.shape[1], k_BSGD.shape[1], q.device)
    index = Index(index.q_BTJE[:, part], index.weight_BTJ[:, part], index.k_BSE)
    scores_BCS = scores(index)
    visible_BCS = visible_BCS.expand_as(scores_BCS)
    chosen_BCK = top(scores_BCS.masked_fill(~visible_BCS, -math.inf), choice.keep)
    some = Chosen(chosen_BCK, visible_BCS, choice.dropout)
    y_BCHE = _way(choice.kind, k_BSGD.shape[1], choice.keep)(q_BCHD, k_BSGD, v_BSGE, some)
    if choice.learns is None:
        return y_BCHE, y_BCHE.new_zeros(())
    if choice.learns == "selected":
        visible_BCS = some.mask_BCS
    wanted_BCS = target(q_BCHD, k_BSGD, visible_BCS)
    return y_BCHE, divergence(wanted_BCS, scores_BCS, visible_BCS)


def _way(kind: str, keys: int, keep: int) -> Callable[..., Tensor]:
    """Gathering moves `keep` keys for every query; a product with a few times as many is faster."""
    if kind == "naive":
        return _written_out
    return _masked if keys <= 8 * keep else _gathered


def _gathered(q_BCHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, some: Chosen) -> Tensor:
    groups, kind = k_BSGD.shape[2], wide(q_BCHD.dtype)
    k_BCKGD, v_BCKGE = (_rows(table, some.index_BCK) for table in (k_BSGD, v_BSGE))
    q_BCGJD = q_BCHD.unflatten(2, (groups, -1))
    logits_BCGJK = torch.einsum("bcgjd,bckgd->bcgjk", q_BCGJD, k_BCKGD) / _root(q_BCHD)
    hidden_BCK = ~some.seen_BCS.gather(-1, some.index_BCK)
    logits_BCGJK = logits_BCGJK.to(kind).masked_fill(hidden_BCK[:, :, None, None], -math.inf)
    weights = F.dropout(logits_BCGJK.softmax(-1), some.dropout).to(v_BSGE.dtype)
    return torch.einsum("bcgjk,bckge->bcgje", weights, v_BCKGE).flatten(2, 3)


def _masked(q_BCHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, some: Chosen) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BCHD, k_BSGD, v_BSGE))
    shared = q.shape[1] != k.shape[1]
    y_BHCE = F.scaled_dot_product_attention(
        q, k, v, attn_mask=some.mask_BCS[:, None], dropout_p=some.dropout, enable_gqa=shared
    )
    return y_BHCE.transpose(1, 2)


def _written_out(q_BCHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, some: Chosen) -> Tensor:
    share, kind = q_BCHD.shape[2] // k_BSGD.shape[2], wide(q_BCHD.dtype)
    k, v = (table.repeat_interleave(share, 2).to(kind) for table in (k_BSGD, v_BSGE))
    logits_BHCS = torch.einsum("bchd,bshd->bhcs", q_BCHD.to(kind), k) / _root(q_BCHD)
    weights = logits_BHCS.masked_fill(~some.mask_BCS[:, None], -math.inf).softmax(-1)
    weights = F.dropout(weights, some.dropout)
    return torch.einsum("bhcs,bshe->bche", weights, v).to(q_BCHD.dtype)


def _rows(table_BSGD: Tensor, chosen_BCK: Tensor) -> Tensor:
    """(B, C, K, G, D), as an embedding: the gradient of an index is summed one by one."""
    rows, keys, groups, width = table_BSGD.shape
    begin_B11 = torch.arange(rows, device=table_BSGD.device)[:, None, None] * keys
    flat = table_BSGD.reshape(rows * keys, groups * width)
    return F.embedding(chosen_BCK + begin_B11, flat).unflatten(-1, (groups, width))


def _root(q: Tensor) -> float:
    return math.sqrt(q.shape[-1])

"""What the policy would have said: answers of a given length that it goes on with by itself, in the
distributions of its tokens or in its best ones. Nothing here has a gradient.

    z_s = logits after the prompt and p_1 ... p_{s-1};   p_s = softmax(z_s / temperature)

A distribution is read as the same mixture of embeddings.

Legend: B rows, T positions of a row, S tokens of the longest answer, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.infer.generate import evaluating
from tinsmith.nn.model import LM
from tinsmith.nn.parts.norm import wide


class Span(NamedTuple):
    """Where answers stand in their rows."""

    opener_B: Tensor
    """The position that predicts an answer's first token."""
    length_B: Tensor
    """Tokens of the answer, its end included."""

    def inside(self, mask_BT: Tensor) -> Tensor:
        """(B, T) bool: the positions of rows like these that predict the answer."""
        index_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        step_BT = index_T - self.opener_B[:, None]
        return (step_BT >= 0) & (step_BT < self.length_B[:, None])


def last_span(mask_BT: Tensor) -> Span:
    """Of every row the last run of targets that count; all rows must have one."""
    index_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    end_B = torch.where(mask_BT, index_T, -1).amax(1)
    gap_BT = ~mask_BT & (index_T < end_B[:, None])
    before_B = torch.where(gap_BT, index_T, -1).amax(1)
    assert bool((end_B >= 0).all()), "every row needs a target"
    return Span(before_B + 1, end_B - before_B)


@torch.no_grad()
def excursion(lm: LM, ids_BT: Tensor, span: Span, *, temperature: float, hard: bool) -> Tensor:
    """(B, S, V): p_1 ... p_S of every row's answer, one-hot where `hard`; 0 behind the answer.

    Rows are read up to their openers, never behind them. The model is in eval mode meanwhile and
    as before afterwards; no random number is drawn.
    """
    lengths = span.length_B.tolist()
    longest, vocabulary = max(lengths), lm.config.vocab_size
    said_BSV = torch.zeros(
        *(len(lengths), longest, vocabulary),
        dtype=wide(lm.embed.weight.dtype),
        device=ids_BT.device,
    )
    with evaluating(lm):
        ids, segments = _prompts(ids_BT, span.opener_B)
        caches = lm.new_caches(len(lengths), ids.shape[1] + longest)
        logits = lm(ids, segments=segments, caches=caches, logits="last").logits
        rows = torch.arange(len(lengths), device=ids_BT.device)
        for step in range(longest):
            assert logits is not None
            said_BSV[rows, step] = _chosen(logits[:, -1], temperature, hard).to(said_BSV)
            left = span.length_B[rows] > step + 1
            if not bool(left.all()):  # these say no more
                kept = left.nonzero()[:, 0]
                rows = rows[kept]
                for cache in caches:
                    cache.select(kept)
            if len(rows):
                newest = said_BSV[rows, step][:, None]
                logits = lm(newest, caches=caches, logits="last").logits
    return said_BSV


def after(true_BTV: Tensor, span: Span, said_BSV: Tensor) -> Tensor:
    """(B, T, V): one-hot rows as the policy is to read them after an excursion, with what it said
    in the place of the answers' tokens but the last.
    """
    index_T = torch.arange(true_BTV.shape[1], device=true_BTV.device)
    step_BT = index_T - span.opener_B[:, None] - 1
    rows, places = ((step_BT >= 0) & (step_BT < span.length_B[:, None] - 1)).nonzero(as_tuple=True)
    read_BTV = true_BTV.clone()
    read_BTV[rows, places] = said_BSV[rows, step_BT[rows, places]]
    return read_BTV


def _prompts(ids_BT: Tensor, opener_B: Tensor) -> tuple[Tensor, Tensor]:
    """Ids up to the openers, padded on the left, and segments: -1 for padding."""
    width = int(opener_B.max()) + 1
    index_BT = torch.arange(width, device=ids_BT.device) - (width - 1 - opener_B)[:, None]
    segments_BT = torch.where(index_BT < 0, -1, 0)
    return ids_BT.gather(1, index_BT.clamp(min=0)), segments_BT


def _chosen(logits_BV: Tensor, temperature: float, hard: bool) -> Tensor:
    high = logits_BV.to(wide(logits_BV.dtype))
    if hard:
        return F.one_hot(high.argmax(-1), high.shape[-1])
    return (high / temperature).softmax(-1)

"""Logits to tokens: pure functions over a batch in which every row has its own settings.

The order is that of transformers: repetition penalty (Keskar et al., 1909.05858), temperature,
top-k, top-p (Holtzman et al., 1904.09751), min-p (Nguyen et al., 2407.01082); of equal scores the
lower id comes first. A row draws its token with one uniform number, a pure function of its seed
and its step, by inverting its own distribution function: nothing else in the batch has a say, and
there is no random state to keep.

Legend: B rows, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tinsmith.core.parse import Config
from tinsmith.core.rng import derive_seed

MIN_TEMPERATURE = 1e-6
"""Below this temperature only the best token is left."""
TOP_P_CANDIDATES = 256
"""Top-p looks at so many of the best tokens before it sorts them all."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams(Config):
    """How one row chooses its tokens. Temperature 0 is greedy; what is None is off; a row without
    a seed is different every time.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be at least 0, and finite")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must be between 0 and 1")
        penalty = self.repetition_penalty
        if not 0 < penalty < math.inf:
            raise ValueError(f"repetition_penalty={penalty} must be above 0, and finite")

    @property
    def greedy(self) -> bool:
        """Always the best token."""
        return self.temperature < MIN_TEMPERATURE


class SamplingTensors(NamedTuple):
    """The samplings of a batch, (B, 1) each; None where no row asks for it."""

    temperature: Tensor
    greedy: Tensor | None
    all_greedy: bool
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    repetition_penalty: Tensor | None


def stack_sampling_params(
    sampling_params: Sequence[SamplingParams], device: torch.device | str = "cpu"
) -> SamplingTensors:
    """The settings of a batch of rows."""

    def column(values: list[float], off: float) -> Tensor | None:
        if all(value == off for value in values):
            return None
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

    greedy = [s.greedy for s in sampling_params]
    heat = [1.0 if s.greedy else s.temperature for s in sampling_params]
    return SamplingTensors(
        temperature=torch.tensor(heat, dtype=torch.float32, device=device)[:, None],
        greedy=torch.tensor(greedy, device=device)[:, None] if any(greedy) else None,
        all_greedy=all(greedy),
        top_k=column([math.inf if s.top_k is None else s.top_k for s in sampling_params], math.inf),
        top_p=column([_mass(s.top_p) for s in sampling_params], math.inf),
        min_p=column([s.min_p or 0.0 for s in sampling_params], 0.0),
        repetition_penalty=column([s.repetition_penalty for s in sampling_params], 1.0),
    )


def _mass(top_p: float | None) -> float:
    """The mass to reach; out of reach where all tokens stay, whatever sums are rounded to."""
    return math.inf if top_p is None or top_p >= 1 else top_p


def uniform(seed: int, step: int) -> float:
    """The random number of one row at one step, in [0, 1)."""
    return (derive_seed(seed, "token", step) >> 10) / 2**53


def sample(
    logits_BV: Tensor,
    settings: SamplingTensors,
    uniform_B: Tensor | None = None,
    seen_BV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(ids (B,), log-probabilities (B,)) of one token per row.

    `uniform_B` (float64, of `uniform`) may be left out where all rows are greedy; `seen_BV` marks
    the tokens that the penalty falls on. A log-probability is that of the model's own distribution
    at the row's temperature (at 1 for a greedy row), without penalty and truncation; NaN where the
    row's logits are not numbers.
    """
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    if settings.all_greedy:
        ids = _best(logits_BV, settings, seen_BV)
        return ids[:, 0], logits_BV.log_softmax(-1).gather(1, ids)[:, 0]
    assert uniform_B is not None
    ids = draw(filter_logits(logits_BV, settings, seen_BV), uniform_B)
    if settings.greedy is not None:
        ids = _best(logits_BV, settings, seen_BV).where(settings.greedy, ids)
    reported = _tempered(logits_BV, settings).log_softmax(-1)
    return ids[:, 0], reported.gather(1, ids)[:, 0]


def filter_logits(
    logits_BV: Tensor, settings: SamplingTensors, seen_BV: Tensor | None = None
) -> Tensor:
    """Scores (B, V) to draw from: penalised, over temperature, -inf where truncated, the best 0."""
    scores = _tempered(apply_repetition_penalty(logits_BV, settings, seen_BV), settings)
    if settings.top_k is not None or settings.top_p is not None:
        scores = _keep_best(scores, _count(scores, settings.top_k, settings.top_p))
    if settings.min_p is not None:
        scores = scores.masked_fill(scores < settings.min_p.log(), -math.inf)
    return scores


def apply_repetition_penalty(
    logits_BV: Tensor, settings: SamplingTensors, seen_BV: Tensor | None
) -> Tensor:
    """Logits of seen tokens over the penalty where positive, times it where negative."""
    if settings.repetition_penalty is None or seen_BV is None:
        return logits_BV
    penalty = settings.repetition_penalty.to(logits_BV.dtype)
    less = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return less.where(seen_BV, logits_BV)


def draw(scores_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """(B, 1): the ids at which the distribution functions of softmax(scores) pass `uniform_B`."""
    reached = scores_BV.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = reached[:, -1:]
    below = torch.minimum(uniform_B[:, None] * total, total.nextafter(torch.zeros_like(total)))
    ids = torch.searchsorted(reached, below, right=True)
    return ids.clamp(max=scores_BV.shape[1] - 1)


def _best(logits_BV: Tensor, settings: SamplingTensors, seen_BV: Tensor | None) -> Tensor:
    """(B, 1): the id of the highest score, the lowest of several."""
    return apply_repetition_penalty(logits_BV, settings, seen_BV).max(-1, keepdim=True).indices


def _tempered(logits_BV: Tensor, settings: SamplingTensors) -> Tensor:
    """Over temperature, shifted so that the best is 0, which no temperature makes overflow."""
    return (logits_BV - logits_BV.amax(-1, keepdim=True)) / settings.temperature


def _count(scores_BV: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """(B, 1) int64: how many of the best tokens stay.

    Top-p: the fewest that reach the mass, of the distribution over what top-k has left.
    """
    size = scores_BV.shape[1]
    limit = torch.full_like(scores_BV[:, :1], size, dtype=torch.long)
    if top_k is not None:
        limit = top_k.clamp(max=size).long()
    if top_p is None:
        return limit
    whole = scores_BV.exp().sum(-1, keepdim=True, dtype=torch.float64)
    for width in (min(TOP_P_CANDIDATES, size), size):
        best = scores_BV.topk(width).values.exp().double()
        best = best.masked_fill(torch.arange(width, device=best.device) >= limit, 0)
        reached = best.cumsum(-1)
        target = top_p * whole.where(limit > width, reached[:, -1:])
        count = (reached - best < target).sum(-1, keepdim=True)
        limit_reached = (count < width) | (limit <= width) | top_p.isinf()
        if bool(limit_reached.all()):
            return torch.minimum(count, limit).where(top_p.isfinite(), limit).clamp(min=1)
    return limit


def _keep_best(scores_BV: Tensor, count_B1: Tensor) -> Tensor:
    """-inf for all but the `count` best of every row, in the order (score down, index up)."""
    size = scores_BV.shape[1]
    most = int(count_B1.where(count_B1 < size, 1).max())
    last = scores_BV.topk(most).values.gather(1, (count_B1 - 1).clamp(max=most - 1))
    last = last.where(count_B1 < size, -math.inf)
    above, tied = scores_BV > last, scores_BV == last
    room = count_B1 - above.sum(-1, keepdim=True)
    return scores_BV.masked_fill(~(above | (tied & (tied.cumsum(-1) <= room))), -math.inf)

"""Sampling of tokens from logits: pure functions over a batch in which every row has its own
sampling parameters.

The order is that of transformers: repetition penalty (Keskar et al., 1909.05858), temperature,
top-k, top-p (Holtzman et al., 1904.09751), min-p (Nguyen et al., 2407.01082). Of equal scores, the
lower id is ranked first. Each row draws its token by inverse transform sampling with one uniform
random number, which is a pure function of the row's seed and step. So a row does not depend on the
rest of the batch, and there is no random state to store.

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
"""Below this temperature, decoding is greedy."""
TOP_P_CANDIDATES = 256
"""Number of highest scores that top-p sorts first; it sorts all scores only if that is too few."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams(Config):
    """Sampling parameters of one row. Temperature 0 is greedy decoding, None turns a filter off,
    and without a seed every generation differs.
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
        """True if the token with the highest score is always taken."""
        return self.temperature < MIN_TEMPERATURE


class SamplingTensors(NamedTuple):
    """Sampling parameters of a batch as tensors (B, 1); None if no row uses the parameter."""

    temperature: Tensor
    greedy: Tensor | None
    all_greedy: bool
    """True if every row is greedy."""
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    repetition_penalty: Tensor | None


def stack_sampling_params(
    sampling_params: Sequence[SamplingParams], device: torch.device | str = "cpu"
) -> SamplingTensors:
    """Stack the sampling parameters of the rows of a batch into tensors."""

    def column(values: list[float], off: float) -> Tensor | None:
        if all(value == off for value in values):
            return None
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

    greedy = [s.greedy for s in sampling_params]
    temperatures = [1.0 if s.greedy else s.temperature for s in sampling_params]
    return SamplingTensors(
        temperature=torch.tensor(temperatures, dtype=torch.float32, device=device)[:, None],
        greedy=torch.tensor(greedy, device=device)[:, None] if any(greedy) else None,
        all_greedy=all(greedy),
        top_k=column([math.inf if s.top_k is None else s.top_k for s in sampling_params], math.inf),
        top_p=column([_top_p_mass(s.top_p) for s in sampling_params], math.inf),
        min_p=column([s.min_p or 0.0 for s in sampling_params], 0.0),
        repetition_penalty=column([s.repetition_penalty for s in sampling_params], 1.0),
    )


def _top_p_mass(top_p: float | None) -> float:
    """Return the cumulative probability to reach; infinity if top-p is off, so that no rounding of
    sums removes a token.
    """
    return math.inf if top_p is None or top_p >= 1 else top_p


def uniform(seed: int, step: int) -> float:
    """Return the uniform random number in [0, 1) for a row's seed and step."""
    return (derive_seed(seed, "token", step) >> 10) / 2**53


def sample(
    logits_BV: Tensor,
    settings: SamplingTensors,
    uniform_B: Tensor | None = None,
    seen_BV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample one token per row. Return ids (B,) and log-probabilities (B,).

    `uniform_B` (float64, from `uniform`) may be None if all rows are greedy. `seen_BV` marks the
    tokens to which the repetition penalty applies. The log-probability is taken from the model's
    distribution at the row's temperature (1 for a greedy row), before penalty and truncation. It
    is NaN if the row's logits are NaN.
    """
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    if settings.all_greedy:
        ids = _argmax(logits_BV, settings, seen_BV)
        return ids[:, 0], logits_BV.log_softmax(-1).gather(1, ids)[:, 0]
    assert uniform_B is not None
    ids = draw(filter_logits(logits_BV, settings, seen_BV), uniform_B)
    if settings.greedy is not None:
        ids = _argmax(logits_BV, settings, seen_BV).where(settings.greedy, ids)
    logprobs_BV = _apply_temperature(logits_BV, settings).log_softmax(-1)
    return ids[:, 0], logprobs_BV.gather(1, ids)[:, 0]


def filter_logits(
    logits_BV: Tensor, settings: SamplingTensors, seen_BV: Tensor | None = None
) -> Tensor:
    """Apply repetition penalty, temperature, top-k, top-p and min-p. Return scores (B, V), shifted
    so that the highest is 0, with -inf for removed tokens.
    """
    penalised = apply_repetition_penalty(logits_BV, settings, seen_BV)
    scores = _apply_temperature(penalised, settings)
    if settings.top_k is not None or settings.top_p is not None:
        scores = _keep_top(scores, _num_candidates(scores, settings.top_k, settings.top_p))
    if settings.min_p is not None:
        scores = scores.masked_fill(scores < settings.min_p.log(), -math.inf)
    return scores


def apply_repetition_penalty(
    logits_BV: Tensor, settings: SamplingTensors, seen_BV: Tensor | None
) -> Tensor:
    """Penalise the logits of seen tokens: divide positive ones by the penalty, and multiply
    negative ones by it.
    """
    if settings.repetition_penalty is None or seen_BV is None:
        return logits_BV
    penalty = settings.repetition_penalty.to(logits_BV.dtype)
    penalised = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return penalised.where(seen_BV, logits_BV)


def draw(scores_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Draw ids (B, 1) from softmax(scores) by inverse transform sampling with `uniform_B`."""
    cdf = scores_BV.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:]
    targets = torch.minimum(uniform_B[:, None] * total, total.nextafter(torch.zeros_like(total)))
    ids = torch.searchsorted(cdf, targets, right=True)
    return ids.clamp(max=scores_BV.shape[1] - 1)


def _argmax(logits_BV: Tensor, settings: SamplingTensors, seen_BV: Tensor | None) -> Tensor:
    """Return the ids (B, 1) of the highest penalised logits; of equal ones, the lowest id."""
    return apply_repetition_penalty(logits_BV, settings, seen_BV).max(-1, keepdim=True).indices


def _apply_temperature(logits_BV: Tensor, settings: SamplingTensors) -> Tensor:
    """Divide logits by the temperature, after a shift of the highest to 0, which avoids overflow
    at low temperatures.
    """
    return (logits_BV - logits_BV.amax(-1, keepdim=True)) / settings.temperature


def _num_candidates(scores_BV: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """Return the number (B, 1) int64 of tokens that top-k and top-p keep.

    Top-p keeps the smallest number of tokens that reach the probability mass, in the distribution
    over the tokens that top-k keeps.
    """
    size = scores_BV.shape[1]
    limit = torch.full_like(scores_BV[:, :1], size, dtype=torch.long)
    if top_k is not None:
        limit = top_k.clamp(max=size).long()
    if top_p is None:
        return limit
    total = _mass_of_best(scores_BV, limit)
    for width in (min(TOP_P_CANDIDATES, size), size):
        weights = scores_BV.topk(width).values.exp().double()
        weights = weights.masked_fill(torch.arange(width, device=weights.device) >= limit, 0)
        cumulative = weights.cumsum(-1)
        target = top_p * total.where(limit > width, cumulative[:, -1:])
        count = (cumulative - weights < target).sum(-1, keepdim=True)
        is_exact = (count < width) | (limit <= width) | top_p.isinf()
        if bool(is_exact.all()):
            return torch.minimum(count, limit).where(top_p.isfinite(), limit).clamp(min=1)
    return limit


def _mass_of_best(scores_BV: Tensor, limit_B1: Tensor) -> Tensor:
    """Return the sum (B, 1) float64 of exp over the `limit` highest scores of each row."""
    size = scores_BV.shape[1]
    total = scores_BV.exp().sum(-1, keepdim=True, dtype=torch.float64)
    partial = limit_B1[limit_B1 < size]
    if not len(partial):
        return total
    weights = scores_BV.topk(int(partial.max())).values.exp()
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    best = cumulative.gather(1, limit_B1.clamp(max=cumulative.shape[1]) - 1)
    return best.where(limit_B1 < size, total)


def _keep_top(scores_BV: Tensor, count_B1: Tensor) -> Tensor:
    """Set all but the `count` highest scores of every row to -inf. Of equal scores, the lower ids
    are kept.
    """
    size = scores_BV.shape[1]
    max_count = int(count_B1.where(count_B1 < size, 1).max())
    threshold = scores_BV.topk(max_count).values.gather(1, (count_B1 - 1).clamp(max=max_count - 1))
    threshold = threshold.where(count_B1 < size, -math.inf)
    above, tied = scores_BV > threshold, scores_BV == threshold
    num_tied_kept = count_B1 - above.sum(-1, keepdim=True)
    keep = above | (tied & (tied.cumsum(-1) <= num_tied_kept))
    return scores_BV.masked_fill(~keep, -math.inf)

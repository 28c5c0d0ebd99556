"""Puzzles of ARC-AGI, two attempts at each test output, right where a cell-for-cell equal one is.

Every view of a puzzle under the 8 symmetries of the square is answered greedily, and what parses is
turned back: the candidates. AugScore (the Tiny-ONN minutes of 2025-08-28) ranks them:

    score(y) = sum over views v of log p(T_v y | T_v puzzle)

The two best different grids are the attempts. Where there are fewer than two candidates, one
sampled answer to each view joins them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from tinsmith.core.rng import derive_seed
from tinsmith.data.arc.encoding import (
    MAX_ANSWER_TOKENS,
    check_grid_tokenizer,
    encode_answer,
    encode_puzzle_prompt,
    parse_answer,
)
from tinsmith.data.arc.grids import Grid, Puzzle, View
from tinsmith.infer.generate import eval_mode, generate
from tinsmith.infer.sample import SamplingParams
from tinsmith.losses.logprobs import token_logprobs
from tinsmith.nn.model import LM
from tinsmith.text.tokenizer import Tokenizer

VIEWS = tuple(View(symmetry) for symmetry in range(8))
NUM_ATTEMPTS = 2
MAX_BATCH_TOKENS = 2**14
"""Of a batch that is scored at once."""


class ArcOutcome(NamedTuple):
    """What became of a puzzle."""

    puzzle: Puzzle
    attempts: tuple[Grid, ...]
    """At most two different grids, the better first."""

    @property
    def correct(self) -> bool:
        """Whether one of them is the answer."""
        return self.puzzle.answer in self.attempts


class ArcResult(NamedTuple):
    """All outcomes, in the order of the puzzles."""

    outcomes: list[ArcOutcome]

    @property
    def task_scores(self) -> dict[str, float]:
        """By task, the share of its test outputs that are right."""
        found: dict[str, list[bool]] = {}
        for outcome in self.outcomes:
            found.setdefault(outcome.puzzle.name, []).append(outcome.correct)
        return {name: sum(each) / len(each) for name, each in found.items()}

    @property
    def score(self) -> float:
        """Right test outputs over all test outputs."""
        return sum(outcome.correct for outcome in self.outcomes) / len(self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON-ready data."""
        tried = sum(bool(outcome.attempts) for outcome in self.outcomes) / len(self.outcomes)
        counts = {"tasks": len(self.task_scores), "outputs": len(self.outcomes)}
        return {"score": self.score, **counts, "answered": tried, "by_task": self.task_scores}


def evaluate_arc(
    lm: LM,
    tokenizer: Tokenizer,
    puzzles: Sequence[Puzzle],
    *,
    batch_size: int = 64,
    max_new_tokens: int = MAX_ANSWER_TOKENS,
    poll: Callable[[], object] = lambda: None,
) -> ArcResult:
    """Two attempts at every puzzle, which must have its answer to be compared with; the answer is
    never part of what the model is asked.

    `rows` answers of at most `max_new` ids at the same time; `poll` is called before every batch of
    puzzles and may raise. Views that leave the model's context no room are not asked. UserError
    where the tokenizer is not that of grids.
    """
    check_grid_tokenizer(tokenizer)
    outcomes = []
    together = max(1, batch_size // len(VIEWS))
    asker = _Asker(lm, tokenizer, batch_size, max_new_tokens)
    with eval_mode(lm):
        for start in range(0, len(puzzles), together):
            poll()
            outcomes += _attempt(puzzles[start : start + together], asker)
    return ArcResult(outcomes)


def rank_candidates(lm: LM, puzzle: Puzzle, candidates: Sequence[Grid]) -> list[tuple[Grid, float]]:
    """Candidates with their AugScores, best first; of equal ones the earlier."""
    scores = aug_scores(lm, puzzle, candidates)
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    return [(candidates[place], scores[place]) for place in order]


def aug_scores(lm: LM, puzzle: Puzzle, candidates: Sequence[Grid]) -> list[float]:
    """Of each candidate the sum over the 8 views of its log-probability, end of turn included;
    minus infinity where a view of it is beyond the model's context.
    """
    cases: list[ScoringCase] = []
    scores = [0.0] * len(candidates)
    for place, grid in enumerate(candidates):
        for view in VIEWS:
            prompt, answer = _prompt(puzzle, view), encode_answer(view.apply(grid))
            if len(prompt) + len(answer) <= lm.config.max_seq_len:
                cases.append((place, prompt, answer))
            else:
                scores[place] = -math.inf
    for batch in _batches(sorted(cases, key=lambda case: len(case[1]) + len(case[2]))):
        for (place, _, _), score in zip(batch, _log_probabilities(lm, batch), strict=True):
            scores[place] += score
    return scores


class _Asker(NamedTuple):
    """A model, and how it is asked."""

    lm: LM
    tokenizer: Tokenizer
    rows: int
    max_new: int

    def answers(
        self, puzzles: Sequence[Puzzle], numbers: Sequence[int], temperature: float
    ) -> Iterator[tuple[int, Grid]]:
        """Answers that are grids to every view of some puzzles, turned back."""
        requested = [
            (number, view, prompt)
            for number in numbers
            for view in VIEWS
            if len(prompt := _prompt(puzzles[number], view)) < self.lm.config.max_seq_len
        ]
        seeds = [
            derive_seed(0, puzzles[n].name, puzzles[n].test_index, v.symmetry)
            for n, v, _ in requested
        ]
        output = generate(
            *(self.lm, self.tokenizer, [prompt for _, _, prompt in requested]),
            sampling_params=[SamplingParams(temperature=temperature, seed=seed) for seed in seeds],
            max_new_tokens=self.max_new,
            batch_size=self.rows,
        )
        for (number, view, _), answer in zip(requested, output, strict=True):
            grid = parse_answer(answer.token_ids)
            if grid is not None:
                yield number, view.invert(grid)


def _attempt(puzzles: Sequence[Puzzle], asker: _Asker) -> Iterator[ArcOutcome]:
    pools: list[list[Grid]] = [[] for _ in puzzles]
    for temperature in (0.0, 1.0):
        lacking = [n for n, pool in enumerate(pools) if len(pool) < NUM_ATTEMPTS]
        for number, grid in asker.answers(puzzles, lacking, temperature):
            if grid not in pools[number]:
                pools[number].append(grid)
    for puzzle, pool in zip(puzzles, pools, strict=True):
        best = rank_candidates(asker.lm, puzzle, pool)[:NUM_ATTEMPTS]
        yield ArcOutcome(puzzle, tuple(grid for grid, _ in best))


def _prompt(puzzle: Puzzle, view: View) -> list[int]:
    """What is asked under a view; made without the answer."""
    seen = view.apply_to_puzzle(puzzle._replace(answer=None))
    return encode_puzzle_prompt(seen.demonstrations, seen.test_input)


ScoringCase = tuple[int, list[int], list[int]]
"""Which candidate, a prompt, an answer to it."""


def _batches(cases: Sequence[ScoringCase]) -> Iterator[list[ScoringCase]]:
    """Cases of rising length, together at most `TOKENS` positions."""
    batch: list[ScoringCase] = []
    for case in cases:
        if batch and (len(batch) + 1) * (len(case[1]) + len(case[2])) > MAX_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(case)
    if batch:
        yield batch


@torch.no_grad()
def _log_probabilities(lm: LM, batch: Sequence[ScoringCase]) -> list[float]:
    """Of every answer after its prompt, summed over its ids, in nats."""
    device = lm.embed.weight.device
    width = max(len(prompt) + len(answer) for _, prompt, answer in batch) - 1
    ids, segments = (torch.full((len(batch), width), fill, device=device) for fill in (0, -1))
    targets, counts = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (_, prompt, answer) in enumerate(batch):
        whole = torch.tensor([*prompt, *answer], device=device)
        ids[row, : len(whole) - 1], targets[row, : len(whole) - 1] = whole[:-1], whole[1:]
        segments[row, : len(whole) - 1] = 0
        counts[row, len(prompt) - 1 : len(whole) - 1] = 1
    logits = lm(ids, segments=segments).logits
    assert logits is not None
    return (token_logprobs(logits, targets) * counts).sum(1).tolist()

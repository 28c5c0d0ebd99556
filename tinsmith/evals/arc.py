"""Evaluate a model on ARC-AGI puzzles: two attempts at each test output, compared cell for cell.

Every view of a puzzle under the 8 symmetries of the square is answered greedily; answers that parse
as grids are transformed back and become candidates. AugScore (the Tiny-ONN minutes of 2025-08-28)
ranks them:

    score(y) = sum over views v of log p(T_v y | T_v puzzle)

The two best distinct grids are the attempts. If there are fewer than two candidates, one sampled
answer to each view is added.
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
"""Largest number of tokens in a batch of candidates."""


class ArcOutcome(NamedTuple):
    """The attempts at one puzzle."""

    puzzle: Puzzle
    attempts: tuple[Grid, ...]
    """At most two distinct grids, the better first."""

    @property
    def correct(self) -> bool:
        """Whether one of the attempts equals the answer."""
        return self.puzzle.answer in self.attempts


class ArcResult(NamedTuple):
    """All outcomes, in the order of the puzzles."""

    outcomes: list[ArcOutcome]

    @property
    def task_scores(self) -> dict[str, float]:
        """Fraction of correct test outputs by task."""
        correct: dict[str, list[bool]] = {}
        for outcome in self.outcomes:
            correct.setdefault(outcome.puzzle.name, []).append(outcome.correct)
        return {name: sum(outcomes) / len(outcomes) for name, outcomes in correct.items()}

    @property
    def score(self) -> float:
        """Fraction of correct test outputs."""
        return sum(outcome.correct for outcome in self.outcomes) / len(self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON-ready data."""
        answered = sum(bool(outcome.attempts) for outcome in self.outcomes) / len(self.outcomes)
        counts = {"tasks": len(self.task_scores), "outputs": len(self.outcomes)}
        return {"score": self.score, **counts, "answered": answered, "by_task": self.task_scores}


def evaluate_arc(
    lm: LM,
    tokenizer: Tokenizer,
    puzzles: Sequence[Puzzle],
    *,
    batch_size: int = 64,
    max_new_tokens: int = MAX_ANSWER_TOKENS,
    poll: Callable[[], object] = lambda: None,
) -> ArcResult:
    """Make two attempts at every puzzle, each of which must have an answer for comparison.

    The answer is never part of the prompt. `batch_size` completions of at most `max_new_tokens` are
    generated at a time; `poll` is called before every batch of puzzles and may raise. Views that do
    not fit the model's context are skipped. UserError if the tokenizer is not that of grids.
    """
    check_grid_tokenizer(tokenizer)
    outcomes = []
    puzzles_per_batch = max(1, batch_size // len(VIEWS))
    generator = _GridGenerator(lm, tokenizer, batch_size, max_new_tokens)
    with eval_mode(lm):
        for start in range(0, len(puzzles), puzzles_per_batch):
            poll()
            outcomes += _attempt(puzzles[start : start + puzzles_per_batch], generator)
    return ArcResult(outcomes)


def rank_candidates(lm: LM, puzzle: Puzzle, candidates: Sequence[Grid]) -> list[tuple[Grid, float]]:
    """Return candidates with their AugScores, best first; ties keep their order."""
    scores = aug_scores(lm, puzzle, candidates)
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    return [(candidates[index], scores[index]) for index in order]


def aug_scores(lm: LM, puzzle: Puzzle, candidates: Sequence[Grid]) -> list[float]:
    """Return for each candidate the sum over the 8 views of its log-probability, end of turn
    included.

    The score is minus infinity if a view does not fit the model's context.
    """
    cases: list[ScoringCase] = []
    scores = [0.0] * len(candidates)
    for index, grid in enumerate(candidates):
        for view in VIEWS:
            prompt, answer = _prompt(puzzle, view), encode_answer(view.apply(grid))
            if len(prompt) + len(answer) <= lm.config.max_seq_len:
                cases.append((index, prompt, answer))
            else:
                scores[index] = -math.inf
    for batch in _batches(sorted(cases, key=lambda case: len(case[1]) + len(case[2]))):
        for (index, _, _), score in zip(batch, _sequence_logprobs(lm, batch), strict=True):
            scores[index] += score
    return scores


class _GridGenerator(NamedTuple):
    """A model with its settings for generating grids."""

    lm: LM
    tokenizer: Tokenizer
    rows: int
    max_new: int

    def answers(
        self, puzzles: Sequence[Puzzle], indices: Sequence[int], temperature: float
    ) -> Iterator[tuple[int, Grid]]:
        """Yield (puzzle index, grid) for all answers that parse, from every view,
        transformed back.
        """
        requests = [
            (index, view, prompt)
            for index in indices
            for view in VIEWS
            if len(prompt := _prompt(puzzles[index], view)) < self.lm.config.max_seq_len
        ]
        seeds = [
            derive_seed(0, puzzles[index].name, puzzles[index].test_index, view.symmetry)
            for index, view, _ in requests
        ]
        completions = generate(
            *(self.lm, self.tokenizer, [prompt for _, _, prompt in requests]),
            sampling_params=[SamplingParams(temperature=temperature, seed=seed) for seed in seeds],
            max_new_tokens=self.max_new,
            batch_size=self.rows,
        )
        for (index, view, _), completion in zip(requests, completions, strict=True):
            grid = parse_answer(completion.token_ids)
            if grid is not None:
                yield index, view.invert(grid)


def _attempt(puzzles: Sequence[Puzzle], generator: _GridGenerator) -> Iterator[ArcOutcome]:
    candidates: list[list[Grid]] = [[] for _ in puzzles]
    for temperature in (0.0, 1.0):
        incomplete = [index for index, grids in enumerate(candidates) if len(grids) < NUM_ATTEMPTS]
        for index, grid in generator.answers(puzzles, incomplete, temperature):
            if grid not in candidates[index]:
                candidates[index].append(grid)
    for puzzle, grids in zip(puzzles, candidates, strict=True):
        best = rank_candidates(generator.lm, puzzle, grids)[:NUM_ATTEMPTS]
        yield ArcOutcome(puzzle, tuple(grid for grid, _ in best))


def _prompt(puzzle: Puzzle, view: View) -> list[int]:
    """Encode the prompt of a view of a puzzle, without the answer."""
    transformed = view.apply_to_puzzle(puzzle._replace(answer=None))
    return encode_puzzle_prompt(transformed.demonstrations, transformed.test_input)


ScoringCase = tuple[int, list[int], list[int]]
"""Index of the candidate, prompt ids, answer ids."""


def _batches(cases: Sequence[ScoringCase]) -> Iterator[list[ScoringCase]]:
    """Group cases of increasing length into batches of at most `MAX_BATCH_TOKENS` tokens."""
    batch: list[ScoringCase] = []
    for case in cases:
        if batch and (len(batch) + 1) * (len(case[1]) + len(case[2])) > MAX_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(case)
    if batch:
        yield batch


@torch.no_grad()
def _sequence_logprobs(lm: LM, batch: Sequence[ScoringCase]) -> list[float]:
    """Return the log-probability of every answer after its prompt, summed over tokens, in nats."""
    device = lm.embed.weight.device
    width = max(len(prompt) + len(answer) for _, prompt, answer in batch) - 1
    ids, segments = (torch.full((len(batch), width), value, device=device) for value in (0, -1))
    targets, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (_, prompt, answer) in enumerate(batch):
        sequence = torch.tensor([*prompt, *answer], device=device)
        ids[row, : len(sequence) - 1], targets[row, : len(sequence) - 1] = (
            sequence[:-1],
            sequence[1:],
        )
        segments[row, : len(sequence) - 1] = 0
        mask[row, len(prompt) - 1 : len(sequence) - 1] = 1
    logits = lm(ids, segments=segments).logits
    assert logits is not None
    return (token_logprobs(logits, targets) * mask).sum(1).tolist()

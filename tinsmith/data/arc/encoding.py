"""Puzzles as ids, and answers back as grids.

    bos, for every demonstration  im_start problem GRID im_end im_start solution GRID im_end,
    the input asked about in the same way, im_start solution | GRID im_end eos

A grid's rows are joined by new lines. What stands before the bar is the prompt: it is made without
the answer. To be learned are the test's output, or all outputs, each with its end of turn; nothing
else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.data.arc.grids import MAX_GRID_SIZE, Grid, Pair, Puzzle
from tinsmith.text.grid_vocab import NUM_COLOURS, PROBLEM, SOLUTION, START_OF_TEXT, SYMBOLS
from tinsmith.text.specials import END_OF_TEXT, END_OF_TURN, START_OF_TURN
from tinsmith.text.tokenizer import Tokenizer

MAX_ANSWER_TOKENS = MAX_GRID_SIZE * MAX_GRID_SIZE + MAX_GRID_SIZE
"""Ids of an answer, at most, its end of turn included."""
NEWLINE_ID = SYMBOLS.index("\n")
_BEGIN, _END = SYMBOLS.index(START_OF_TURN), SYMBOLS.index(END_OF_TURN)
_PROBLEM, _SOLUTION = SYMBOLS.index(PROBLEM), SYMBOLS.index(SOLUTION)
_BOS, _EOS = SYMBOLS.index(START_OF_TEXT), SYMBOLS.index(END_OF_TEXT)


@dataclass(frozen=True)
class ArcExample:
    """A puzzle to learn from, and whether its demonstrations' outputs are learned too."""

    puzzle: Puzzle
    train_on_all_outputs: bool

    def texts(self) -> list[str]:
        """Return the grids as one text."""
        return ["\n".join(grid_to_text(grid) for grid in self.puzzle.grids())]

    def tokenizer_texts(self) -> list[str]:
        """Return the texts that a tokenizer is trained on."""
        return self.texts()


class EncodedExample(NamedTuple):
    """Ids, and which of them are to be learned."""

    ids: list[int]
    mask: list[bool]


def is_grid_tokenizer(tokenizer: Tokenizer) -> bool:
    """Whether ids mean what they do here."""
    return tokenizer.vocab_size == len(SYMBOLS) and PROBLEM in tokenizer.added_tokens


def check_grid_tokenizer(tokenizer: Tokenizer) -> None:
    """UserError where ids mean something else."""
    if not is_grid_tokenizer(tokenizer):
        raise UserError("grids are written in ids of their own: set tokenizer: {symbols: grids}")


def encode_example(example: ArcExample) -> EncodedExample:
    """The whole task. The puzzle must have its answer."""
    puzzle = example.puzzle
    assert puzzle.answer is not None, "a lesson needs its answer"
    ids, mask = [_BOS], [False]
    for pair in puzzle.demonstrations:
        before = _turn(_PROBLEM, pair.input)
        after = _turn(_SOLUTION, pair.output)
        ids += before + after
        mask += [False] * (len(before) + 2) + [example.train_on_all_outputs] * (len(after) - 2)
    prompt = encode_puzzle_prompt(puzzle.demonstrations, puzzle.test_input)
    answer = encode_answer(puzzle.answer)
    learned = [False] * (len(prompt) - len(ids)) + [True] * len(answer)
    return EncodedExample([*prompt, *answer, _EOS], [*mask, *learned, False])


def encode_puzzle_prompt(demonstrations: Sequence[Pair], test_input: Grid) -> list[int]:
    """All up to where the answer begins."""
    ids = [_BOS]
    for pair in demonstrations:
        ids += _turn(_PROBLEM, pair.input) + _turn(_SOLUTION, pair.output)
    return [*ids, *_turn(_PROBLEM, test_input), _BEGIN, _SOLUTION]


def encode_answer(grid: Grid) -> list[int]:
    """A grid and its end of turn."""
    return [*_cells(grid), _END]


def parse_answer(ids: Sequence[int]) -> Grid | None:
    """The grid of an answer; None where it has no end, or is empty, ragged or too large."""
    if not ids or ids[-1] != _END:
        return None
    rows: list[list[int]] = [[]]
    for number in ids[:-1]:
        if number == NEWLINE_ID:
            rows.append([])
        elif number < NUM_COLOURS:
            rows[-1].append(number)
        else:
            return None
    width = len(rows[0])
    fits = 0 < width <= MAX_GRID_SIZE and len(rows) <= MAX_GRID_SIZE
    return tuple(map(tuple, rows)) if fits and all(len(row) == width for row in rows) else None


def answer_has_input_shape(ids: Sequence[int], start: int, stop: int) -> bool:
    """Whether the answer ids[start:stop], its end of turn included, is a grid of the shape of the
    last input before it.
    """
    before = list(ids[:start])
    begin = len(before) - before[::-1].index(_PROBLEM) if _PROBLEM in before else len(before)
    if _END not in before[begin:]:
        return False
    requested = before[begin : before.index(_END, begin) + 1]
    places = [
        [i for i, n in enumerate(run) if n == NEWLINE_ID] for run in (requested, ids[start:stop])
    ]
    return len(requested) == stop - start and places[0] == places[1]


def grid_to_text(grid: Grid) -> str:
    """A grid as text."""
    return "\n".join("".join(map(str, row)) for row in grid)


def _turn(kind: int, grid: Grid) -> list[int]:
    return [_BEGIN, kind, *_cells(grid), _END]


def _cells(grid: Grid) -> list[int]:
    ids = list(grid[0])
    for row in grid[1:]:
        ids += [NEWLINE_ID, *row]
    return ids

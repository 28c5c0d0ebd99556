"""Encoding of puzzles as token ids, and parsing of generated answers into grids.

    bos
    for every demonstration: im_start problem GRID im_end im_start solution GRID im_end
    im_start problem TEST_INPUT im_end im_start solution | ANSWER im_end eos

The rows of a grid are joined by newlines. Everything before the bar is the prompt, which does not
depend on the answer. Trained tokens are the answer, or all outputs, each with its im_end.
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
"""Maximum number of ids of an answer, with its end of turn."""
NEWLINE_ID = SYMBOLS.index("\n")
_BEGIN, _END = SYMBOLS.index(START_OF_TURN), SYMBOLS.index(END_OF_TURN)
_PROBLEM, _SOLUTION = SYMBOLS.index(PROBLEM), SYMBOLS.index(SOLUTION)
_BOS, _EOS = SYMBOLS.index(START_OF_TEXT), SYMBOLS.index(END_OF_TEXT)


@dataclass(frozen=True)
class ArcExample:
    """A puzzle with its answer, as a training example."""

    puzzle: Puzzle
    train_on_all_outputs: bool
    """If True, the outputs of the demonstrations are trained too."""

    def texts(self) -> list[str]:
        """Return the grids as one text."""
        return ["\n".join(grid_to_text(grid) for grid in self.puzzle.grids())]

    def tokenizer_texts(self) -> list[str]:
        """Return the texts that a tokenizer is trained on."""
        return self.texts()


class EncodedExample(NamedTuple):
    """Token ids and loss mask (True for trained tokens) of an example."""

    ids: list[int]
    mask: list[bool]


def is_grid_tokenizer(tokenizer: Tokenizer) -> bool:
    """Return True if a tokenizer has the ids of `grid_vocab.SYMBOLS`."""
    return tokenizer.vocab_size == len(SYMBOLS) and PROBLEM in tokenizer.added_tokens


def check_grid_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise UserError if a tokenizer cannot encode grids."""
    if not is_grid_tokenizer(tokenizer):
        raise UserError("grids need their own tokenizer: set tokenizer: {symbols: grids}")


def encode_example(example: ArcExample) -> EncodedExample:
    """Encode a puzzle with its answer."""
    puzzle = example.puzzle
    assert puzzle.answer is not None, "an example needs its answer"
    demonstration_ids, mask = [_BOS], [False]
    for pair in puzzle.demonstrations:
        input_ids = _encode_turn(_PROBLEM, pair.input)
        output_ids = _encode_turn(_SOLUTION, pair.output)
        demonstration_ids += input_ids + output_ids
        mask += [False] * (len(input_ids) + 2)
        mask += [example.train_on_all_outputs] * (len(output_ids) - 2)
    prompt = encode_puzzle_prompt(puzzle.demonstrations, puzzle.test_input)
    answer = encode_answer(puzzle.answer)
    mask += [False] * (len(prompt) - len(demonstration_ids)) + [True] * len(answer)
    return EncodedExample([*prompt, *answer, _EOS], [*mask, False])


def encode_puzzle_prompt(demonstrations: Sequence[Pair], test_input: Grid) -> list[int]:
    """Encode demonstrations and test input, up to the start of the answer."""
    ids = [_BOS]
    for pair in demonstrations:
        ids += _encode_turn(_PROBLEM, pair.input) + _encode_turn(_SOLUTION, pair.output)
    return [*ids, *_encode_turn(_PROBLEM, test_input), _BEGIN, _SOLUTION]


def encode_answer(grid: Grid) -> list[int]:
    """Encode a grid, followed by the end of turn."""
    return [*_encode_grid(grid), _END]


def parse_answer(ids: Sequence[int]) -> Grid | None:
    """Parse the ids of an answer into a grid. Return None if it has no end of turn, or is empty,
    ragged or too large.
    """
    if not ids or ids[-1] != _END:
        return None
    rows: list[list[int]] = [[]]
    for token_id in ids[:-1]:
        if token_id == NEWLINE_ID:
            rows.append([])
        elif token_id < NUM_COLOURS:
            rows[-1].append(token_id)
        else:
            return None
    width = len(rows[0])
    is_valid_size = 0 < width <= MAX_GRID_SIZE and len(rows) <= MAX_GRID_SIZE
    return (
        tuple(map(tuple, rows))
        if is_valid_size and all(len(row) == width for row in rows)
        else None
    )


def answer_has_input_shape(ids: Sequence[int], start: int, stop: int) -> bool:
    """Return True if the answer ids[start:stop], with its end of turn, is a grid of the same shape
    as the last input before it.
    """
    prompt = list(ids[:start])
    begin = len(prompt) - prompt[::-1].index(_PROBLEM) if _PROBLEM in prompt else len(prompt)
    if _END not in prompt[begin:]:
        return False
    test_input = prompt[begin : prompt.index(_END, begin) + 1]
    input_newlines, answer_newlines = (
        [i for i, token_id in enumerate(grid_ids) if token_id == NEWLINE_ID]
        for grid_ids in (test_input, ids[start:stop])
    )
    return len(test_input) == stop - start and input_newlines == answer_newlines


def grid_to_text(grid: Grid) -> str:
    """Format a grid as text, one line of digits per row."""
    return "\n".join("".join(map(str, row)) for row in grid)


def _encode_turn(role_id: int, grid: Grid) -> list[int]:
    return [_BEGIN, role_id, *_encode_grid(grid), _END]


def _encode_grid(grid: Grid) -> list[int]:
    ids = list(grid[0])
    for row in grid[1:]:
        ids += [NEWLINE_ID, *row]
    return ids

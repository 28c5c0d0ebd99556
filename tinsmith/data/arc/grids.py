"""Grids of ARC-AGI (Chollet, 1911.01547): puzzles, their symmetries, and one augmentation for all
grids of a puzzle.

A puzzle shows pairs of grids that one rule connects, and asks what becomes of one more grid. The
rule keeps its meaning where every grid of the puzzle is turned, mirrored or recoloured alike.
"""

import random
from typing import NamedTuple

Grid = tuple[tuple[int, ...], ...]
"""Rows of colours 0 to 9, all of one length."""

MAX_GRID_SIZE = 30
"""Rows and columns of a grid, at most."""


class Pair(NamedTuple):
    """What one grid becomes."""

    input: Grid
    output: Grid


class Puzzle(NamedTuple):
    """A task with one of its test inputs."""

    name: str
    test_index: int
    """Which of the task's test inputs, from 0."""
    demonstrations: tuple[Pair, ...]
    test_input: Grid
    answer: Grid | None
    """None where it is hidden."""

    def grids(self) -> list[Grid]:
        """All of them, the answer last."""
        shown = [grid for pair in self.demonstrations for grid in pair]
        return [*shown, self.test_input, *([self.answer] if self.answer else [])]


class View(NamedTuple):
    """A change of colours, then one of the 8 symmetries of the square."""

    symmetry: int = 0
    """Quarter turns to the right, after an exchange of rows and columns where it is 4 or more."""
    colours: tuple[int, ...] = tuple(range(10))
    """What each colour becomes: a permutation."""

    def apply(self, grid: Grid) -> Grid:
        """The grid seen so."""
        return apply_symmetry(
            tuple(tuple(self.colours[c] for c in row) for row in grid), self.symmetry
        )

    def invert(self, grid: Grid) -> Grid:
        """The grid that is seen as `grid`."""
        colours = tuple(self.colours.index(colour) for colour in range(10))
        plain = apply_symmetry(grid, inverse_symmetry(self.symmetry))
        return tuple(tuple(colours[c] for c in row) for row in plain)

    def apply_to_puzzle(self, puzzle: Puzzle) -> Puzzle:
        """The puzzle, every grid of it seen so."""
        return puzzle._replace(
            demonstrations=tuple(
                Pair(self.apply(pair.input), self.apply(pair.output))
                for pair in puzzle.demonstrations
            ),
            test_input=self.apply(puzzle.test_input),
            answer=self.apply(puzzle.answer) if puzzle.answer else None,
        )


def apply_symmetry(grid: Grid, symmetry: int) -> Grid:
    """The grid under symmetry 0 to 7; see `View`."""
    if symmetry >= 4:
        grid = tuple(zip(*grid, strict=True))
    for _ in range(symmetry % 4):
        grid = tuple(zip(*reversed(grid), strict=True))
    return grid


def inverse_symmetry(symmetry: int) -> int:
    """The symmetry that undoes one: a mirror image undoes itself."""
    return symmetry if symmetry >= 4 else -symmetry % 4


def augment(
    puzzle: Puzzle,
    rng: random.Random,
    *,
    symmetries: bool,
    colours: str,
    shuffle_demonstrations: bool,
) -> Puzzle:
    """The puzzle under one view for all its grids, demonstrations in another order.

    `colours`: `all` are permuted, `keep_0` all but the background, or `none`.
    """
    first = {"all": 0, "keep_0": 1, "none": 10}[colours]
    permuted = list(range(first, 10))
    rng.shuffle(permuted)
    view = View(rng.randrange(8) if symmetries else 0, (*range(first), *permuted))
    seen = view.apply_to_puzzle(puzzle)
    shown = list(seen.demonstrations)
    if shuffle_demonstrations:
        rng.shuffle(shown)
    return seen._replace(demonstrations=tuple(shown))

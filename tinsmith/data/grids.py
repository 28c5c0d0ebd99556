"""Grids of ARC-AGI (Chollet, 1911.01547): puzzles, their symmetries, and one augmentation for all
grids of a puzzle.

A puzzle shows pairs of grids that one rule connects, and asks what becomes of one more grid. The
rule keeps its meaning where every grid of the puzzle is turned, mirrored or recoloured alike.
"""

import random
from typing import NamedTuple

Grid = tuple[tuple[int, ...], ...]
"""Rows of colours 0 to 9, all of one length."""

LARGEST = 30
"""Rows and columns of a grid, at most."""


class Pair(NamedTuple):
    """What one grid becomes."""

    input: Grid
    output: Grid


class Puzzle(NamedTuple):
    """A task with one of its test inputs."""

    name: str
    number: int
    """Which of the task's test inputs, from 0."""
    shown: tuple[Pair, ...]
    asked: Grid
    answer: Grid | None
    """None where it is hidden."""

    def grids(self) -> list[Grid]:
        """All of them, the answer last."""
        shown = [grid for pair in self.shown for grid in pair]
        return [*shown, self.asked, *([self.answer] if self.answer else [])]


class View(NamedTuple):
    """A change of colours, then one of the 8 symmetries of the square."""

    symmetry: int = 0
    """Quarter turns to the right, after an exchange of rows and columns where it is 4 or more."""
    colours: tuple[int, ...] = tuple(range(10))
    """What each colour becomes: a permutation."""

    def of(self, grid: Grid) -> Grid:
        """The grid seen so."""
        return turned(tuple(tuple(self.colours[c] for c in row) for row in grid), self.symmetry)

    def back(self, grid: Grid) -> Grid:
        """The grid that is seen as `grid`."""
        colours = tuple(self.colours.index(colour) for colour in range(10))
        plain = turned(grid, inverse(self.symmetry))
        return tuple(tuple(colours[c] for c in row) for row in plain)

    def of_puzzle(self, puzzle: Puzzle) -> Puzzle:
        """The puzzle, every grid of it seen so."""
        return puzzle._replace(
            shown=tuple(Pair(self.of(pair.input), self.of(pair.output)) for pair in puzzle.shown),
            asked=self.of(puzzle.asked),
            answer=self.of(puzzle.answer) if puzzle.answer else None,
        )


def turned(grid: Grid, symmetry: int) -> Grid:
    """The grid under symmetry 0 to 7; see `View`."""
    if symmetry >= 4:
        grid = tuple(zip(*grid, strict=True))
    for _ in range(symmetry % 4):
        grid = tuple(zip(*reversed(grid), strict=True))
    return grid


def inverse(symmetry: int) -> int:
    """The symmetry that undoes one: a mirror image undoes itself."""
    return symmetry if symmetry >= 4 else -symmetry % 4


def drawn(
    puzzle: Puzzle, numbers: random.Random, *, symmetries: bool, colours: str, order: bool
) -> Puzzle:
    """The puzzle under one view for all its grids, demonstrations in another order.

    `colours`: `all` are permuted, `keep_0` all but the background, or `none`.
    """
    first = {"all": 0, "keep_0": 1, "none": 10}[colours]
    permuted = list(range(first, 10))
    numbers.shuffle(permuted)
    view = View(numbers.randrange(8) if symmetries else 0, (*range(first), *permuted))
    seen = view.of_puzzle(puzzle)
    shown = list(seen.shown)
    if order:
        numbers.shuffle(shown)
    return seen._replace(shown=tuple(shown))

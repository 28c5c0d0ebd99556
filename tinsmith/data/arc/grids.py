"""Grids and puzzles of ARC-AGI (Chollet, 1911.01547), and their augmentation by symmetries and
colour permutations.

A puzzle has demonstrations, which are pairs of grids connected by one rule, and a test input to
which the rule is to be applied. The rule remains valid if all grids of the puzzle are rotated,
mirrored or recoloured in the same way.
"""

import random
from typing import NamedTuple

Grid = tuple[tuple[int, ...], ...]
"""Rows of equal length, of colours 0 to 9."""

MAX_GRID_SIZE = 30
"""Maximum number of rows and of columns of a grid."""


class Pair(NamedTuple):
    """An input grid and its output grid."""

    input: Grid
    output: Grid


class Puzzle(NamedTuple):
    """A task with a single one of its test inputs."""

    name: str
    test_index: int
    """Index of the test input within the task."""
    demonstrations: tuple[Pair, ...]
    test_input: Grid
    answer: Grid | None
    """Output of the test input, or None if it is not known."""

    def grids(self) -> list[Grid]:
        """Return all grids, the answer last."""
        demonstration_grids = [grid for pair in self.demonstrations for grid in pair]
        return [*demonstration_grids, self.test_input, *([self.answer] if self.answer else [])]


class View(NamedTuple):
    """An augmentation: a permutation of the colours, then one of the 8 symmetries of the square."""

    symmetry: int = 0
    """Number of quarter turns to the right, modulo 4; with 4 or more, after a transposition."""
    colours: tuple[int, ...] = tuple(range(10))
    """Permutation: colours[c] replaces colour c."""

    def apply(self, grid: Grid) -> Grid:
        """Return the augmented grid."""
        return apply_symmetry(
            tuple(tuple(self.colours[c] for c in row) for row in grid), self.symmetry
        )

    def invert(self, grid: Grid) -> Grid:
        """Undo `apply`: return the original of an augmented grid."""
        inverse_colours = tuple(self.colours.index(colour) for colour in range(10))
        original = apply_symmetry(grid, inverse_symmetry(self.symmetry))
        return tuple(tuple(inverse_colours[c] for c in row) for row in original)

    def apply_to_puzzle(self, puzzle: Puzzle) -> Puzzle:
        """Return the puzzle with all its grids augmented."""
        return puzzle._replace(
            demonstrations=tuple(
                Pair(self.apply(pair.input), self.apply(pair.output))
                for pair in puzzle.demonstrations
            ),
            test_input=self.apply(puzzle.test_input),
            answer=self.apply(puzzle.answer) if puzzle.answer else None,
        )


def apply_symmetry(grid: Grid, symmetry: int) -> Grid:
    """Apply symmetry 0 to 7 to a grid; see `View.symmetry`."""
    if symmetry >= 4:
        grid = tuple(zip(*grid, strict=True))
    for _ in range(symmetry % 4):
        grid = tuple(zip(*reversed(grid), strict=True))
    return grid


def inverse_symmetry(symmetry: int) -> int:
    """Return the inverse of a symmetry. Reflections (4 to 7) are their own inverse."""
    return symmetry if symmetry >= 4 else -symmetry % 4


def augment(
    puzzle: Puzzle,
    rng: random.Random,
    *,
    symmetries: bool,
    colours: str,
    shuffle_demonstrations: bool,
) -> Puzzle:
    """Apply one random view to all grids of a puzzle, and shuffle its demonstrations.

    `colours` selects the colours that are permuted: `all`, `keep_0` (all except for the background)
    or `none`.
    """
    num_fixed = {"all": 0, "keep_0": 1, "none": 10}[colours]
    permuted = list(range(num_fixed, 10))
    rng.shuffle(permuted)
    view = View(rng.randrange(8) if symmetries else 0, (*range(num_fixed), *permuted))
    augmented = view.apply_to_puzzle(puzzle)
    demonstrations = list(augmented.demonstrations)
    if shuffle_demonstrations:
        rng.shuffle(demonstrations)
    return augmented._replace(demonstrations=tuple(demonstrations))

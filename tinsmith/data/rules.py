"""Generated puzzles: one drawn rule connects every input with its output.

A rule is a kind with its parameters, or two kinds one after the other. `SEEN` are to train on,
`HELD_BACK` are for examination only: no view of a puzzle of the one (see `grids.View`) follows a
rule of the other, because kinds keep to themselves under symmetries and changes of colours.

A puzzle is a pure function of (rules, seed, index, sizes): the same everywhere, without end.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from tinsmith.data.grids import LARGEST, Grid, Pair, Puzzle, turned

TRIES = 200
"""Grids drawn for a rule until it changes one."""
PALETTE = 4
"""Colours of a puzzle beside the background, at most."""

Change = Callable[[Grid], Grid]


class Sizes(NamedTuple):
    """How large generated puzzles are."""

    smallest: int = 3
    largest: int = 6
    """Rows and columns of an input: from 3, where all rules differ, to 10, which some triple."""
    demonstrations: int = 3


def generate(rule: str, seed: int, index: int, sizes: Sizes) -> Puzzle:
    """Puzzle number `index` of a rule: a name of `KINDS`, or two joined by `+`."""
    numbers = random.Random(f"{rule}/{seed}/{index}/{sizes}")
    while True:
        palette = numbers.sample(range(1, 10), PALETTE)
        changes = [KINDS[kind](numbers, palette) for kind in rule.split("+")]
        pairs = [_pair(changes, numbers, palette, sizes) for _ in range(sizes.demonstrations + 1)]
        found = [pair for pair in pairs if pair is not None]
        if len(found) == len(pairs) and len({pair.input for pair in found}) == len(found):
            *shown, (asked, answer) = found
            return Puzzle(f"{rule}-{index}", 0, tuple(shown), asked, answer)


def generated(rules: Sequence[str], seed: int, count: int, sizes: Sizes) -> Iterator[Puzzle]:
    """Puzzles of all the rules in turn."""
    for index in range(count):
        yield generate(rules[index % len(rules)], seed, index, sizes)


def held_back_beside(rules: Sequence[str]) -> list[str]:
    """The rules that are held back and made of no other kinds than these."""
    kinds = {kind for rule in rules for kind in rule.split("+")}
    return [rule for rule in HELD_BACK if kinds.issuperset(rule.split("+"))]


def _pair(
    changes: Sequence[Change], numbers: random.Random, palette: list[int], sizes: Sizes
) -> Pair | None:
    """An input that every change matters for; None where none was found."""
    for _ in range(TRIES):
        given = _draw(numbers, palette, sizes)
        output, moved = given, True
        for change in changes:
            output, before = change(output), output
            moved = moved and output != before
        if moved and output != given:
            return Pair(given, output)
    return None


def _draw(numbers: random.Random, palette: list[int], sizes: Sizes) -> Grid:
    height, width = (numbers.randint(sizes.smallest, sizes.largest) for _ in range(2))
    share = numbers.uniform(0.3, 0.7)
    return tuple(
        tuple(numbers.choice(palette) if numbers.random() < share else 0 for _ in range(width))
        for _ in range(height)
    )


def _always(change: Change) -> Callable[[random.Random, list[int]], Change]:
    return lambda numbers, palette: change


def _turned(symmetries: Sequence[int]) -> Callable[[random.Random, list[int]], Change]:
    """One of some symmetries of the square."""

    def draw(numbers: random.Random, palette: list[int]) -> Change:
        symmetry = numbers.choice(symmetries)
        return lambda grid: turned(grid, symmetry)

    return draw


def _along(change: Change) -> Callable[[random.Random, list[int]], Change]:
    """What is told of one side, done to any of the four."""

    def draw(numbers: random.Random, palette: list[int]) -> Change:
        side = numbers.randrange(4)
        return lambda grid: turned(change(turned(grid, side)), -side % 4)

    return draw


def _recolour(numbers: random.Random, palette: list[int]) -> Change:
    """Every cell of one colour gets another."""
    old, new = numbers.sample(palette, 2)
    return lambda grid: _each(grid, lambda cell: new if cell == old else cell)


def _swap(numbers: random.Random, palette: list[int]) -> Change:
    """Two colours change places."""
    one, other = numbers.sample(palette, 2)
    return lambda grid: _each(grid, lambda cell: {one: other, other: one}.get(cell, cell))


def _keep(numbers: random.Random, palette: list[int]) -> Change:
    """Only one colour stays."""
    kept = numbers.choice(palette)
    return lambda grid: _each(grid, lambda cell: cell if cell == kept else 0)


def _frame(numbers: random.Random, palette: list[int]) -> Change:
    """The outermost cells get a colour."""
    colour = numbers.choice(palette)

    def change(grid: Grid) -> Grid:
        inner = [(colour, *row[1:-1], colour)[-len(row) :] for row in grid[1:-1]]
        edge = (colour,) * len(grid[0])
        return (edge, *inner, edge)[: len(grid)]

    return change


def _fill(numbers: random.Random, palette: list[int]) -> Change:
    """The background gets a colour."""
    colour = numbers.choice(palette)
    return lambda grid: _each(grid, lambda cell: cell or colour)


def _tile(numbers: random.Random, palette: list[int]) -> Change:
    """The grid is laid side by side, or below itself too."""
    down, across = numbers.choice(((1, 2), (2, 1), (2, 2)))
    return lambda grid: tuple(row * across for row in grid) * down


def _enlarge(numbers: random.Random, palette: list[int]) -> Change:
    """Every cell becomes a square of 2 x 2 or 3 x 3."""
    by = numbers.choice((2, 3))
    return lambda grid: tuple(
        row for cells in grid for row in (tuple(c for c in cells for _ in range(by)),) * by
    )


def _count(numbers: random.Random, palette: list[int]) -> Change:
    """A bar of as many cells as the grid has of one colour; a cell of background where none. No
    bar is longer than a grid may be: nothing changes then.
    """
    colour = numbers.choice(palette)

    def change(grid: Grid) -> Grid:
        found = sum(row.count(colour) for row in grid)
        return grid if found > LARGEST else ((colour,) * found or (0,),)

    return change


def _most(grid: Grid) -> Grid:
    """Every cell gets the commonest colour; nothing changes where there are two of them."""
    counts = Counter(cell for row in grid for cell in row if cell).most_common(2)
    if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]):
        return grid
    return _each(grid, lambda cell: counts[0][0])


def _crop(grid: Grid) -> Grid:
    """The smallest part that holds all that is no background."""
    down = [y for y, row in enumerate(grid) if any(row)]
    across = [x for x, column in enumerate(zip(*grid, strict=True)) if any(column)]
    if not down:
        return ((0,),)
    return tuple(row[across[0] : across[-1] + 1] for row in grid[down[0] : down[-1] + 1])


def _fall(grid: Grid) -> Grid:
    """Coloured cells fall to the left, in their order."""
    return tuple(tuple(sorted(row, key=lambda cell: cell == 0)) for row in grid)


def _shift(grid: Grid) -> Grid:
    """Everything moves one cell, and what leaves comes back on the other side."""
    return tuple((*row[1:], row[0]) for row in grid)


def _ray(grid: Grid) -> Grid:
    """Coloured cells shine to the right over the background, up to the next of them."""

    def shone(row: tuple[int, ...]) -> tuple[int, ...]:
        light, lit = 0, []
        for cell in row:
            light = cell or light
            lit.append(light)
        return tuple(lit)

    return tuple(map(shone, grid))


def _half(grid: Grid) -> Grid:
    """The left half, the middle column included."""
    return tuple(row[: (len(row) + 1) // 2] for row in grid)


def _unfold(grid: Grid) -> Grid:
    """The grid with its mirror image behind it."""
    return tuple(row + row[::-1] for row in grid)


def _each(grid: Grid, change: Callable[[int], int]) -> Grid:
    return tuple(tuple(map(change, row)) for row in grid)


KINDS: dict[str, Callable[[random.Random, list[int]], Change]] = {
    "recolour": _recolour,
    "swap": _swap,
    "keep": _keep,
    "fill": _fill,
    "frame": _frame,
    "most": _always(_most),
    "count": _count,
    "mirror": _turned((4, 5, 6, 7)),
    "rotate": _turned((1, 2, 3)),
    "shift": _along(_shift),
    "gravity": _along(_fall),
    "ray": _along(_ray),
    "half": _along(_half),
    "unfold": _along(_unfold),
    "crop": _always(_crop),
    "tile": _tile,
    "enlarge": _enlarge,
}
"""Name -> draws the parameters of a rule, from a puzzle's palette."""
HELD_BACK = (
    *("swap+mirror", "recolour+gravity", "fill+rotate", "keep+shift", "ray+mirror"),
    *("crop+recolour", "gravity+frame", "ray+rotate", "keep+crop", "swap+tile"),
    *("recolour+fill", "keep+recolour"),
)
SEEN = (
    *KINDS,
    *("recolour+mirror", "swap+gravity", "fill+mirror", "keep+rotate", "fill+shift"),
    *("crop+swap", "gravity+fill", "ray+recolour", "keep+gravity", "recolour+tile"),
    *("swap+fill", "keep+fill"),
)

"""Generated puzzles: one drawn rule connects every input with its output.

A rule is a kind with its parameters, or two kinds one after the other. `SEEN` are to train on,
`HELD_BACK` are for examination only: no seen rule explains what is shown of a puzzle held back, nor
any view of it that keeps the background (see `grids.View`), because kinds keep to themselves under
symmetries and changes of colours, and because the few that one explains by chance are drawn again.
A puzzle to train on may now and then be one that a held-back rule would explain too.

A puzzle is a pure function of (rules, seed, index, sizes): the same everywhere, without end.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations, permutations, product
from typing import NamedTuple

from tinsmith.data.arc.grids import MAX_GRID_SIZE, Grid, Pair, Puzzle, apply_symmetry

MAX_TRIES = 200
"""Grids drawn for a rule until it changes one."""
PALETTE_SIZE = 4
"""Colours of a puzzle beside the background, at most."""

GridTransform = Callable[[Grid], Grid]
Palette = Sequence[int]


class Sizes(NamedTuple):
    """How large generated puzzles are."""

    smallest: int = 3
    largest: int = 6
    """Rows and columns of an input: from 3, where all rules differ, to 10, which some triple."""
    demonstrations: int = 3


def generate_puzzle(rule: str, seed: int, index: int, sizes: Sizes) -> Puzzle:
    """Puzzle number `index` of a rule: a name of `KINDS`, or two joined by `+`."""
    numbers = random.Random(f"{rule}/{seed}/{index}/{sizes}")
    while True:
        palette = numbers.sample(range(1, 10), PALETTE_SIZE)
        changes = [numbers.choice(KINDS[kind](palette)) for kind in rule.split("+")]
        pairs = [_pair(changes, numbers, palette, sizes) for _ in range(sizes.demonstrations + 1)]
        found = [pair for pair in pairs if pair is not None]
        if len(found) < len(pairs) or len({pair.input for pair in found}) < len(found):
            continue
        *shown, (requested, answer) = found
        if rule not in HELD_OUT_RULES or not any(
            explains(seen, shown, palette) for seen in TRAIN_RULES
        ):
            return Puzzle(f"{rule}-{index}", 0, tuple(shown), requested, answer)


def generate_puzzles(rules: Sequence[str], seed: int, count: int, sizes: Sizes) -> Iterator[Puzzle]:
    """Puzzles of all the rules in turn."""
    for index in range(count):
        yield generate_puzzle(rules[index % len(rules)], seed, index, sizes)


def explains(rule: str, demonstrations: Sequence[Pair], palette: Palette) -> bool:
    """Whether a rule, with some parameters from the palette, makes every output that is shown."""
    kinds = [KINDS[kind](palette) for kind in rule.split("+")]
    return any(
        all(_made(changes, pair.input) == pair.output for pair in demonstrations)
        for changes in product(*kinds)
    )


def held_out_compositions(rules: Sequence[str]) -> list[str]:
    """The rules that are held back and made of no other kinds than these."""
    kinds = {kind for rule in rules for kind in rule.split("+")}
    return [rule for rule in HELD_OUT_RULES if kinds.issuperset(rule.split("+"))]


def _pair(
    changes: Sequence[GridTransform], numbers: random.Random, palette: Palette, sizes: Sizes
) -> Pair | None:
    """An input that every change matters for; None where none was found."""
    for _ in range(MAX_TRIES):
        given = _draw(numbers, palette, sizes)
        output, moved = given, True
        for change in changes:
            output, before = change(output), output
            moved = moved and output != before
        if moved and output != given:
            return Pair(given, output)
    return None


def _made(changes: Sequence[GridTransform], grid: Grid) -> Grid:
    for change in changes:
        grid = change(grid)
    return grid


def _draw(numbers: random.Random, palette: Palette, sizes: Sizes) -> Grid:
    height, width = (numbers.randint(sizes.smallest, sizes.largest) for _ in range(2))
    share = numbers.uniform(0.3, 0.7)
    return tuple(
        tuple(numbers.choice(palette) if numbers.random() < share else 0 for _ in range(width))
        for _ in range(height)
    )


def _symmetries(found: Sequence[int]) -> Callable[[Palette], list[GridTransform]]:
    """Some symmetries of the square."""
    return lambda palette: [partial(apply_symmetry, symmetry=one) for one in found]


def _along(change: GridTransform) -> Callable[[Palette], list[GridTransform]]:
    """What is told of one side, done to any of the four."""

    def turned_to(side: int) -> GridTransform:
        return lambda grid: apply_symmetry(change(apply_symmetry(grid, side)), -side % 4)

    return lambda palette: list(map(turned_to, range(4)))


def _recolour(palette: Palette) -> list[GridTransform]:
    """Every cell of one colour gets another."""
    return [_painted({old: new}) for old, new in permutations(palette, 2)]


def _swap(palette: Palette) -> list[GridTransform]:
    """Two colours change places."""
    return [_painted({one: other, other: one}) for one, other in combinations(palette, 2)]


def _keep(palette: Palette) -> list[GridTransform]:
    """Only one colour stays."""
    return [_painted({cell: 0 for cell in range(10) if cell != kept}) for kept in palette]


def _fill(palette: Palette) -> list[GridTransform]:
    """The background gets a colour."""
    return [_painted({0: colour}) for colour in palette]


def _painted(colours: dict[int, int]) -> GridTransform:
    """Other colours for some."""
    return lambda grid: _each(grid, lambda cell: colours.get(cell, cell))


def _frame(palette: Palette) -> list[GridTransform]:
    """The outermost cells get a colour."""

    def framed(colour: int, grid: Grid) -> Grid:
        inner = [(colour, *row[1:-1], colour)[-len(row) :] for row in grid[1:-1]]
        edge = (colour,) * len(grid[0])
        return (edge, *inner, edge)[: len(grid)]

    return [partial(framed, colour) for colour in palette]


def _tile(palette: Palette) -> list[GridTransform]:
    """The grid is laid side by side, or below itself too."""

    def tiled(down: int, across: int, grid: Grid) -> Grid:
        return tuple(row * across for row in grid) * down

    return [partial(tiled, *times) for times in ((1, 2), (2, 1), (2, 2))]


def _enlarge(palette: Palette) -> list[GridTransform]:
    """Every cell becomes a square of 2 x 2 or 3 x 3."""

    def enlarged(by: int, grid: Grid) -> Grid:
        wide = [tuple(cell for cell in row for _ in range(by)) for row in grid]
        return tuple(row for row in wide for _ in range(by))

    return [partial(enlarged, by) for by in (2, 3)]


def _count(palette: Palette) -> list[GridTransform]:
    """A bar, lying or standing, of as many cells as the grid has of one colour; a cell of
    background where none. No bar is longer than a grid may be: nothing changes then.
    """

    def lying(colour: int, grid: Grid) -> Grid:
        found = sum(row.count(colour) for row in grid)
        return grid if found > MAX_GRID_SIZE else ((colour,) * found or (0,),)

    def standing(colour: int, grid: Grid) -> Grid:
        found = lying(colour, grid)
        return grid if found == grid else tuple(zip(*found, strict=True))

    return [partial(bar, colour) for colour in palette for bar in (lying, standing)]


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


KINDS: dict[str, Callable[[Palette], list[GridTransform]]] = {
    "recolour": _recolour,
    "swap": _swap,
    "keep": _keep,
    "fill": _fill,
    "frame": _frame,
    "most": lambda palette: [_most],
    "count": _count,
    "mirror": _symmetries((4, 5, 6, 7)),
    "rotate": _symmetries((1, 2, 3)),
    "shift": _along(_shift),
    "gravity": _along(_fall),
    "ray": _along(_ray),
    "half": _along(_half),
    "unfold": _along(_unfold),
    "crop": lambda palette: [_crop],
    "tile": _tile,
    "enlarge": _enlarge,
}
"""Name -> all that the kind may do with a puzzle's palette."""
HELD_OUT_RULES = (
    *("swap+mirror", "recolour+gravity", "fill+rotate", "keep+shift", "ray+mirror"),
    *("crop+recolour", "gravity+frame", "ray+rotate", "keep+crop", "swap+tile"),
    *("recolour+fill", "keep+recolour", "recolour+keep", "recolour+swap"),
)
TRAIN_RULES = (
    *KINDS,
    *("recolour+mirror", "swap+gravity", "fill+mirror", "keep+rotate", "fill+shift"),
    *("crop+swap", "gravity+fill", "ray+recolour", "keep+gravity", "recolour+tile"),
    *("swap+fill", "keep+fill"),
)

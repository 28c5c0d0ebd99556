"""Generators of synthetic puzzles, in which one random rule maps every input to its output.

A rule is one kind of grid transform with random parameters, or a composition of two kinds.
`TRAIN_RULES` are for training, `HELD_OUT_RULES` only for evaluation. No training rule explains the
demonstrations of a held-out puzzle, or of any view of it that keeps the background (see
`grids.View`): every kind is closed under symmetries and colour permutations, and the few held-out
puzzles that a training rule explains by chance are drawn again. The reverse is not checked: a
held-out rule may explain a training puzzle.

A puzzle is a pure function of (rule, seed, index, sizes).
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations, permutations, product
from typing import NamedTuple

from tinsmith.data.arc.grids import MAX_GRID_SIZE, Grid, Pair, Puzzle, apply_symmetry

MAX_TRIES = 200
"""Maximum number of random inputs to draw until a rule changes one."""
PALETTE_SIZE = 4
"""Maximum number of colours of a puzzle, without the background."""

GridTransform = Callable[[Grid], Grid]
Palette = Sequence[int]


class Sizes(NamedTuple):
    """Sizes of generated puzzles."""

    smallest: int = 3
    """Minimum number of rows and of columns of an input; at least 3, so that all rules differ."""
    largest: int = 6
    """Maximum number of rows and of columns of an input; at most 10, as some rules triple it."""
    demonstrations: int = 3
    """Number of demonstrations."""


def generate_puzzle(rule: str, seed: int, index: int, sizes: Sizes) -> Puzzle:
    """Generate puzzle `index` of a rule, which is a name in `KINDS`, or two joined by `+`."""
    rng = random.Random(f"{rule}/{seed}/{index}/{sizes}")
    while True:
        palette = rng.sample(range(1, 10), PALETTE_SIZE)
        transforms = [rng.choice(KINDS[kind](palette)) for kind in rule.split("+")]
        pairs = [
            _draw_pair(transforms, rng, palette, sizes) for _ in range(sizes.demonstrations + 1)
        ]
        valid = [pair for pair in pairs if pair is not None]
        if len(valid) < len(pairs) or len({pair.input for pair in valid}) < len(valid):
            continue
        *demonstrations, (test_input, answer) = valid
        if rule not in HELD_OUT_RULES or not any(
            explains(train_rule, demonstrations, palette) for train_rule in TRAIN_RULES
        ):
            return Puzzle(f"{rule}-{index}", 0, tuple(demonstrations), test_input, answer)


def generate_puzzles(rules: Sequence[str], seed: int, count: int, sizes: Sizes) -> Iterator[Puzzle]:
    """Yield `count` puzzles, from each rule in turn."""
    for index in range(count):
        yield generate_puzzle(rules[index % len(rules)], seed, index, sizes)


def explains(rule: str, demonstrations: Sequence[Pair], palette: Palette) -> bool:
    """Return True if a rule, with some parameters from the palette, gives the output of every
    demonstration.
    """
    kinds = [KINDS[kind](palette) for kind in rule.split("+")]
    return any(
        all(_compose(transforms, pair.input) == pair.output for pair in demonstrations)
        for transforms in product(*kinds)
    )


def held_out_compositions(rules: Sequence[str]) -> list[str]:
    """Return the held-out rules that are composed only of kinds that occur in `rules`."""
    kinds = {kind for rule in rules for kind in rule.split("+")}
    return [rule for rule in HELD_OUT_RULES if kinds.issuperset(rule.split("+"))]


def _draw_pair(
    transforms: Sequence[GridTransform], rng: random.Random, palette: Palette, sizes: Sizes
) -> Pair | None:
    """Draw an input that every transform changes, and return it with its output. Return None if
    none is found in `MAX_TRIES` tries.
    """
    for _ in range(MAX_TRIES):
        input_grid = _draw_grid(rng, palette, sizes)
        output, all_change = input_grid, True
        for transform in transforms:
            output, before = transform(output), output
            all_change = all_change and output != before
        if all_change and output != input_grid:
            return Pair(input_grid, output)
    return None


def _compose(transforms: Sequence[GridTransform], grid: Grid) -> Grid:
    for transform in transforms:
        grid = transform(grid)
    return grid


def _draw_grid(rng: random.Random, palette: Palette, sizes: Sizes) -> Grid:
    height, width = (rng.randint(sizes.smallest, sizes.largest) for _ in range(2))
    density = rng.uniform(0.3, 0.7)
    return tuple(
        tuple(rng.choice(palette) if rng.random() < density else 0 for _ in range(width))
        for _ in range(height)
    )


def _symmetries(numbers: Sequence[int]) -> Callable[[Palette], list[GridTransform]]:
    """Return a kind with these symmetries of the square as transforms."""
    return lambda palette: [partial(apply_symmetry, symmetry=number) for number in numbers]


def _in_four_directions(transform: GridTransform) -> Callable[[Palette], list[GridTransform]]:
    """Return a kind with a transform in four directions, from one that works to the left."""

    def rotate(quarter_turns: int) -> GridTransform:
        return lambda grid: apply_symmetry(
            transform(apply_symmetry(grid, quarter_turns)), -quarter_turns % 4
        )

    return lambda palette: list(map(rotate, range(4)))


def _recolour(palette: Palette) -> list[GridTransform]:
    """Replace one colour by another."""
    return [_replace_colours({old: new}) for old, new in permutations(palette, 2)]


def _swap(palette: Palette) -> list[GridTransform]:
    """Swap two colours."""
    return [_replace_colours({a: b, b: a}) for a, b in combinations(palette, 2)]


def _keep(palette: Palette) -> list[GridTransform]:
    """Replace all colours except for one by the background."""
    return [
        _replace_colours({cell: 0 for cell in range(10) if cell != colour}) for colour in palette
    ]


def _fill(palette: Palette) -> list[GridTransform]:
    """Replace the background by a colour."""
    return [_replace_colours({0: colour}) for colour in palette]


def _replace_colours(replacements: dict[int, int]) -> GridTransform:
    return lambda grid: _map_cells(grid, lambda cell: replacements.get(cell, cell))


def _frame(palette: Palette) -> list[GridTransform]:
    """Colour the outermost cells."""

    def frame(colour: int, grid: Grid) -> Grid:
        inner = [(colour, *row[1:-1], colour)[-len(row) :] for row in grid[1:-1]]
        edge = (colour,) * len(grid[0])
        return (edge, *inner, edge)[: len(grid)]

    return [partial(frame, colour) for colour in palette]


def _tile(palette: Palette) -> list[GridTransform]:
    """Repeat the grid horizontally, vertically, or both."""

    def tile(down: int, across: int, grid: Grid) -> Grid:
        return tuple(row * across for row in grid) * down

    return [partial(tile, *repeats) for repeats in ((1, 2), (2, 1), (2, 2))]


def _enlarge(palette: Palette) -> list[GridTransform]:
    """Replace every cell by a square of 2 x 2 or 3 x 3 cells."""

    def enlarge(factor: int, grid: Grid) -> Grid:
        wide = [tuple(cell for cell in row for _ in range(factor)) for row in grid]
        return tuple(row for row in wide for _ in range(factor))

    return [partial(enlarge, factor) for factor in (2, 3)]


def _count(palette: Palette) -> list[GridTransform]:
    """Replace the grid by a horizontal or vertical bar with as many cells as the grid has of one
    colour, or by a background cell if it has none. The grid is unchanged if the bar would be longer
    than `MAX_GRID_SIZE`.
    """

    def horizontal(colour: int, grid: Grid) -> Grid:
        count = sum(row.count(colour) for row in grid)
        return grid if count > MAX_GRID_SIZE else ((colour,) * count or (0,),)

    def vertical(colour: int, grid: Grid) -> Grid:
        bar = horizontal(colour, grid)
        return grid if bar == grid else tuple(zip(*bar, strict=True))

    return [partial(bar, colour) for colour in palette for bar in (horizontal, vertical)]


def _most(grid: Grid) -> Grid:
    """Replace every cell by the most frequent colour. The grid is unchanged if two colours are
    equally frequent.
    """
    counts = Counter(cell for row in grid for cell in row if cell).most_common(2)
    if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]):
        return grid
    return _map_cells(grid, lambda cell: counts[0][0])


def _crop(grid: Grid) -> Grid:
    """Crop to the smallest rectangle with all cells that are not background."""
    rows = [y for y, row in enumerate(grid) if any(row)]
    columns = [x for x, column in enumerate(zip(*grid, strict=True)) if any(column)]
    if not rows:
        return ((0,),)
    return tuple(row[columns[0] : columns[-1] + 1] for row in grid[rows[0] : rows[-1] + 1])


def _fall(grid: Grid) -> Grid:
    """Move coloured cells to the left as far as possible, keeping their order."""
    return tuple(tuple(sorted(row, key=lambda cell: cell == 0)) for row in grid)


def _shift(grid: Grid) -> Grid:
    """Shift the grid cyclically by one cell to the left."""
    return tuple((*row[1:], row[0]) for row in grid)


def _ray(grid: Grid) -> Grid:
    """Extend every coloured cell to the right over the background, up to the next coloured cell."""

    def extend(row: tuple[int, ...]) -> tuple[int, ...]:
        colour, extended = 0, []
        for cell in row:
            colour = cell or colour
            extended.append(colour)
        return tuple(extended)

    return tuple(map(extend, grid))


def _half(grid: Grid) -> Grid:
    """Keep the left half, with the middle column."""
    return tuple(row[: (len(row) + 1) // 2] for row in grid)


def _unfold(grid: Grid) -> Grid:
    """Append the mirror image to the right of the grid."""
    return tuple(row + row[::-1] for row in grid)


def _map_cells(grid: Grid, function: Callable[[int], int]) -> Grid:
    return tuple(tuple(map(function, row)) for row in grid)


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
    "shift": _in_four_directions(_shift),
    "gravity": _in_four_directions(_fall),
    "ray": _in_four_directions(_ray),
    "half": _in_four_directions(_half),
    "unfold": _in_four_directions(_unfold),
    "crop": lambda palette: [_crop],
    "tile": _tile,
    "enlarge": _enlarge,
}
"""Kinds by name: each returns its transforms, with all parameters, for a palette."""
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

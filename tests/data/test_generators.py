"""Generated puzzles: pure functions, right answers, and rules that are held back for good."""

import random
from itertools import product

import pytest

from tinsmith.core.errors import UserError
from tinsmith.core.parse import parse
from tinsmith.data.arc.generators import HELD_OUT_RULES, KINDS, TRAIN_RULES, Sizes, generate_puzzle
from tinsmith.data.arc.grids import View, apply_symmetry
from tinsmith.data.sources import ArcData

GRID = ((0, 1, 0), (2, 0, 1), (0, 0, 3))


def outputs(kind, grid):
    """All that a kind makes of a grid."""
    return {change(grid) for change in KINDS[kind]((1, 2, 3, 4))}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("recolour", ((0, 4, 0), (2, 0, 4), (0, 0, 3))),
        ("swap", ((0, 2, 0), (1, 0, 2), (0, 0, 3))),
        ("keep", ((0, 1, 0), (0, 0, 1), (0, 0, 0))),
        ("fill", ((4, 1, 4), (2, 4, 1), (4, 4, 3))),
        ("frame", ((2, 2, 2), (2, 0, 2), (2, 2, 2))),
        ("most", ((1, 1, 1),) * 3),
        ("count", ((1, 1),)),
        ("mirror", ((0, 1, 0), (1, 0, 2), (3, 0, 0))),
        ("rotate", ((3, 0, 0), (1, 0, 2), (0, 1, 0))),
        ("shift", ((1, 0, 0), (0, 1, 2), (0, 3, 0))),
        ("gravity", ((0, 0, 0), (0, 0, 1), (2, 1, 3))),
        ("ray", ((0, 1, 1), (2, 2, 1), (0, 0, 3))),
        ("half", ((0, 1), (2, 0), (0, 0))),
        ("unfold", ((0, 1, 0, 0, 1, 0), (2, 0, 1, 1, 0, 2), (0, 0, 3, 3, 0, 0))),
        ("tile", GRID * 2),
        (
            "enlarge",
            ((0, 0, 1, 1, 0, 0),) * 2 + ((2, 2, 0, 0, 1, 1),) * 2 + ((0,) * 4 + (3, 3),) * 2,
        ),
    ],
)
def test_a_kind_gives_the_expected_grid(kind, expected):
    assert expected in outputs(kind, GRID)


def test_crop_removes_the_background_around_the_coloured_cells():
    assert outputs("crop", ((0, 0, 0), (0, 1, 0), (0, 0, 2))) == {((1, 0), (0, 2))}


def test_there_are_at_least_ten_kinds_and_each_is_a_training_rule():
    assert len(KINDS) >= 10
    assert set(KINDS) < set(TRAIN_RULES)


@pytest.mark.parametrize("rule", [*TRAIN_RULES, *HELD_OUT_RULES])
def test_a_puzzle_is_a_pure_function_and_its_rule_changes_every_input(rule):
    sizes = Sizes(3, 5, 3)
    first = [generate_puzzle(rule, 1, index, sizes) for index in range(30)]
    assert [generate_puzzle(rule, 1, index, sizes) for index in reversed(range(30))][::-1] == first
    assert generate_puzzle(rule, 2, 0, sizes) != first[0]
    assert len({puzzle.test_input for puzzle in first}) > 20
    for puzzle in first:
        assert len(puzzle.demonstrations) == 3
        assert puzzle.test_input not in [pair.input for pair in puzzle.demonstrations]
        for before, after in [*puzzle.demonstrations, (puzzle.test_input, puzzle.answer)]:
            assert before != after
            assert all(3 <= len(side) <= 5 for side in (before, before[0]))
            assert 0 < len(after) <= 30


def all_transforms(rule, palette):
    return list(product(*(KINDS[kind](palette) for kind in rule.split("+"))))


def apply_all(transforms, grids):
    for transform in transforms:
        grids = [transform(grid) for grid in grids]
    return tuple(grids)


def every_step_changes(transforms, grids):
    """Whether every step matters: no other puzzle is generated."""
    stages = [apply_all(transforms[:count], grids) for count in range(len(transforms) + 1)]
    return len(set(stages)) == len(stages)


def test_held_out_rules_are_not_views_of_training_rules():
    """As functions, on grids drawn for the purpose: names alone could hide the same rule. Some of
    the parameters may (recolour 1 to 2, keep 3): such puzzles are drawn anew, see below.
    """
    assert not set(TRAIN_RULES) & set(HELD_OUT_RULES)
    rng, palette = random.Random(0), [1, 2, 3, 4]
    probes = [
        tuple(tuple(rng.choice((0, 0, *palette)) for _ in range(w)) for _ in range(h))
        for h, w in ((3, 3), (3, 4), (4, 3), (5, 4), (4, 4), (5, 5), (3, 5))
    ]
    train_outputs = set()
    for rule in TRAIN_RULES:
        for transforms, symmetry in product(all_transforms(rule, palette), range(8)):
            view = View(symmetry, (0, *rng.sample(palette, 4), 5, 6, 7, 8, 9))
            outputs = apply_all(transforms, [view.invert(probe) for probe in probes])
            train_outputs.add(tuple(map(view.apply, outputs)))
    for rule in HELD_OUT_RULES:
        outputs_of_rule = [
            apply_all(transforms, probes)
            for transforms in all_transforms(rule, palette)
            if every_step_changes(transforms, probes)
        ]
        assert (
            2 * sum(puzzle not in train_outputs for puzzle in outputs_of_rule)
            >= len(outputs_of_rule)
            > 0
        ), rule


@pytest.mark.parametrize("rule", HELD_OUT_RULES)
def test_no_training_rule_explains_a_held_out_puzzle(rule):
    """Small grids and few demonstrations: by chance a simpler rule would do, one time in fifty."""
    rng = random.Random(rule)
    for index in range(30):
        puzzle = generate_puzzle(rule, 0, index, Sizes(3, 3, 2))
        view = View(rng.randrange(8), (0, *rng.sample(range(1, 10), 9)))
        inputs = [view.apply(pair.input) for pair in puzzle.demonstrations]
        expected = tuple(view.apply(pair.output) for pair in puzzle.demonstrations)
        palette = sorted({c for grid in (*inputs, *expected) for row in grid for c in row} - {0})
        for train_rule in TRAIN_RULES:
            for transforms in all_transforms(train_rule, palette):
                assert apply_all(transforms, inputs) != expected, (train_rule, puzzle)


def test_a_generated_puzzle_is_pinned():
    puzzle = generate_puzzle("mirror", 0, 0, Sizes(3, 3, 1))
    assert puzzle.answer in [apply_symmetry(puzzle.test_input, s) for s in (4, 5, 6, 7)]
    assert puzzle.test_input == ((4, 0, 0), (7, 2, 3), (7, 0, 0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rules": ["miror"]}, "'miror' is not a training rule. Did you mean 'mirror'"),
        ({"rules": ["swap+mirror"]}, "'swap+mirror' is not a training rule"),
        ({"min_grid_size": 2}, "min_grid_size=2 must be from 3 to 6"),
        ({"max_grid_size": 11}, "max_grid_size=11 must be from 3 to 10"),
        ({"demonstrations": 0}, "demonstrations=0 must be from 1 to 10"),
        ({"views": 0}, "views=0 must be from 1"),
        ({"solutions": "x.json"}, "solutions belong to tasks at a path"),
        ({"colours": "some"}, "'all', 'keep_0' or 'none'"),
    ],
)
def test_an_invalid_value_is_a_one_line_error_that_names_the_key(config, message):
    with pytest.raises(UserError) as caught:
        parse(ArcData, config, "data")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

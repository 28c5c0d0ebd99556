"""Training gives the committed first losses, which `regenerate.py` writes."""

import json

import pytest

from tests.golden.regenerate import LOSSES, RECIPES, losses

GOLDEN = json.loads(LOSSES.read_text(encoding="utf-8"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_first_losses_are_the_committed_ones(recipe):
    found = losses(recipe)
    assert len(found) == 10
    assert found == pytest.approx(GOLDEN[recipe.stem], rel=1e-3)


def test_golden_losses_fall():
    assert set(GOLDEN) == {"note", *(recipe.stem for recipe in RECIPES)}
    assert all(GOLDEN[recipe.stem][-1] < GOLDEN[recipe.stem][0] - 0.5 for recipe in RECIPES)

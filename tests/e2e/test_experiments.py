"""Experiments that can be run, compare what they say they compare, and pages that say what came."""

import importlib
import json
import shutil
from itertools import product
from pathlib import Path

import pytest

from experiments.alignment import cases as alignment
from experiments.attention import cases as attention
from experiments.attention.run import TEXT
from experiments.eavi import cases as eavi
from experiments.hyper_smoe import cases as hyper_smoe
from experiments.routers import cases as routers
from experiments.routers.run import ACTIVE, SIZES
from tinsmith.config import from_dict
from tinsmith.hub.transplant import TransplantPlan, transplant_config
from tinsmith.nn.config import ModelConfig

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.mark.parametrize("case", routers.CASES)
def test_routers_are_compared_at_equal_numbers_of_parameters_that_a_token_meets(case):
    met = routers.active(routers.model(case, SIZES, ACTIVE))
    # a width is even, and two more in eight experts of four layers are 2.7 %: at most half of it
    assert met == pytest.approx(ACTIVE, rel=0.014)


@pytest.mark.parametrize("case", product(attention.MIXERS, attention.RESIDUALS))
def test_mixers_are_compared_at_equal_numbers_of_parameters(case):
    section = attention.model(case, TEXT, 32, 1_000_000)
    assert attention.count(section) == pytest.approx(1_000_000, rel=0.01)


@pytest.mark.parametrize("case", hyper_smoe.CASES)
def test_students_can_be_made_of_their_teacher(case):
    teacher = ModelConfig.from_dict(hyper_smoe.TEACHER)
    student = transplant_config(teacher, TransplantPlan(hyper_smoe.CASES[case].feed))
    assert student.layers[0].mixer == teacher.layers[0].mixer


@pytest.mark.parametrize("model", eavi.MODELS)
def test_both_stages_of_every_model_are_recipes(model):
    from_dict(eavi.start(model, 0, 10))
    for way in eavi.WAYS:
        train = from_dict(eavi.second(way, "runs/begun", 0, 10, save_every=2)).train
        assert train.keep.last * train.save_every >= train.steps, "the one of equal tasks stays"


def test_rules_of_an_examination_are_none_that_were_taught():
    assert eavi.HELD
    assert not set(eavi.HELD) & set(eavi.RULES)


def test_sums_of_an_examination_are_none_that_were_taught():
    sums = alignment.sums()
    requested = [{row["messages"][0]["content"] for row in rows} for rows in sums]
    taught, learned, held_back = requested
    assert taught == learned
    assert len(held_back) == alignment.HELD_BACK
    assert not held_back & learned


@pytest.mark.parametrize("name", sorted(path.parent.name for path in EXPERIMENTS.glob("*/page.py")))
def test_a_page_says_what_its_results_say(tmp_path, name):
    if not (EXPERIMENTS / name / "results.json").exists():
        pytest.skip("not run yet")
    there = shutil.copytree(EXPERIMENTS / name, tmp_path / name)
    (there / "README.md").unlink()
    rows = json.loads((there / "results.json").read_text(encoding="utf-8"))
    importlib.import_module(f"experiments.{name}.page").write(rows, there)
    written, kept = (
        (folder / name / "README.md").read_text() for folder in (tmp_path, EXPERIMENTS)
    )
    assert written == kept

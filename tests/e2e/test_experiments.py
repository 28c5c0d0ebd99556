"""Experiments compare models of equal size, and their pages agree with their results."""

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
def test_routers_are_compared_at_equal_numbers_of_active_parameters(case):
    active_params = routers.active(routers.model(case, SIZES, ACTIVE))
    # widths are even; two more in eight experts of four layers are 2.7 %, so at most half of that
    assert active_params == pytest.approx(ACTIVE, rel=0.014)


@pytest.mark.parametrize("case", product(attention.MIXERS, attention.RESIDUALS))
def test_mixers_are_compared_at_equal_numbers_of_parameters(case):
    section = attention.model(case, TEXT, 32, 1_000_000)
    assert attention.count(section) == pytest.approx(1_000_000, rel=0.01)


@pytest.mark.parametrize("case", hyper_smoe.CASES)
def test_students_are_valid_transplants_of_their_teacher(case):
    teacher = ModelConfig.from_dict(hyper_smoe.TEACHER)
    student = transplant_config(teacher, TransplantPlan(hyper_smoe.CASES[case].feed))
    assert student.layers[0].mixer == teacher.layers[0].mixer


@pytest.mark.parametrize("model", eavi.MODELS)
def test_both_stages_of_every_model_are_valid_recipes(model):
    from_dict(eavi.start(model, 0, 10))
    for way in eavi.WAYS:
        train = from_dict(eavi.second(way, "runs/begun", 0, 10, save_every=2)).train
        assert train.keep.last * train.save_every >= train.steps, (
            "the checkpoint after the same number of tasks is kept"
        )


def test_evaluation_rules_are_disjoint_from_training_rules():
    assert eavi.HELD
    assert not set(eavi.HELD) & set(eavi.RULES)


def test_evaluation_sums_are_disjoint_from_training_sums():
    sums = alignment.sums()
    prompts = [{chat["messages"][0]["content"] for chat in chats} for chats in sums]
    sft, rl, held_out = prompts
    assert sft == rl
    assert len(held_out) == alignment.HELD_OUT
    assert not held_out & rl


@pytest.mark.parametrize("name", sorted(path.parent.name for path in EXPERIMENTS.glob("*/page.py")))
def test_a_page_equals_the_page_generated_from_its_results(tmp_path, name):
    if not (EXPERIMENTS / name / "results.json").exists():
        pytest.skip("not run yet")
    copy = shutil.copytree(EXPERIMENTS / name, tmp_path / name)
    (copy / "README.md").unlink()
    results = json.loads((copy / "results.json").read_text(encoding="utf-8"))
    importlib.import_module(f"experiments.{name}.page").write(results, copy)
    generated, committed = (
        (folder / name / "README.md").read_text() for folder in (tmp_path, EXPERIMENTS)
    )
    assert generated == committed

"""Every recipe is complete: it validates and survives a dry run."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tinsmith.config import dump, from_dict, load
from tinsmith.core.errors import UserError
from tinsmith.core.parse import plain
from tinsmith.objectives.online import Online
from tinsmith.train.dryrun import dry_run

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
LARGE = ("hyper_smoe_0.6b",)
"""A step of these takes a minute."""
TRIED = [
    pytest.param(path, marks=[pytest.mark.slow] if path.stem in LARGE else []) for path in RECIPES
]


@pytest.mark.parametrize("path", TRIED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_survives_a_dry_run(path, monkeypatch, tmp_path, capsys, request):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path))
    text = path.read_text(encoding="utf-8")
    if "$TINSMITH_DATA" in text:
        monkeypatch.setenv("TINSMITH_DATA", str(request.getfixturevalue("real_data")))
    config = load(path)
    if config.init_from is not None:
        assert not Path(config.init_from).exists()
        if config.model is None:
            pytest.skip("begins from a run that another recipe makes")
        config = replace(config, init_from=None)
    judges = [folder for folder in config.objective.judges().values() if folder]
    if judges:
        with pytest.raises(UserError, match=f"{judges[0]}: no such folder"):
            dry_run(config, path.stem)
    else:
        dry_run(config, path.stem)
    said = capsys.readouterr().out
    assert "one step of" in said
    assert ("dry run   ok" in said) != bool(judges)
    assert "parameters" in said
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_is_commented_and_round_trips(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line for line in lines[:4] if line.startswith("#")]
    assert len(head) >= 2, "what it is, and what it takes"
    assert any("min" in line or "hour" in line or "day" in line for line in head), head
    config = load(path)
    assert from_dict(plain(config)) == config
    assert "schema: 1" in dump(config)


ANSWERING = [path for path in RECIPES if isinstance(load(path).objective, Online)]


@pytest.mark.parametrize("path", ANSWERING, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_rollouts_come_out_even_and_no_step_sees_two_of_them(path):
    config = load(path)
    objective, train = config.objective, config.train
    assert isinstance(objective, Online)
    objective.check_share(train.rows)
    parts = objective.minibatches * objective.updates
    assert parts % train.accumulate == 0, "a rollout is a whole number of steps"
    said = re.search(r"([\d,]+) rollouts of (\d+)", path.read_text(encoding="utf-8"))
    if said:
        rollouts, answers = (int(number.replace(",", "")) for number in said.groups())
        assert rollouts == train.steps * train.accumulate / parts
        assert answers == train.rows * objective.answers


def test_both_tiny_recipes_need_nothing_but_python():
    for name in ("pretrain", "sft"):
        config = load(ROOT / "recipes" / "tiny" / f"{name}.yaml")
        assert [source.kind for source in config.data] == ["stdlib"]
        assert config.init_from is None
    text = (ROOT / "recipes" / "tiny" / "pretrain.yaml").read_text(encoding="utf-8")
    assert "  pattern:" in text
    assert os.environ.get("HF_HUB_OFFLINE") == "1"

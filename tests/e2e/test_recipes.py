"""Every recipe is complete: it validates and survives a dry run."""

import json
import os
import re
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tinsmith.config import dump, from_dict, load
from tinsmith.core.errors import UserError
from tinsmith.core.parse import to_plain
from tinsmith.data.prepare.tokenizer import tokenizer_fingerprint
from tinsmith.hub.hf import export_folder
from tinsmith.hub.transplant import TransplantPlan, build_transplant
from tinsmith.nn.model import LM
from tinsmith.objectives.rl.base import RLConfig
from tinsmith.text.bpe import train_bpe
from tinsmith.text.grid_vocab import grid_tokenizer
from tinsmith.train.dryrun import dry_run
from tinsmith.train.plan import resolve
from tinsmith.verbs.config import show

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
LARGE = ("hyper_smoe_0.6b",)
"""A step of these takes a minute."""
TRIED = [
    pytest.param(path, marks=[pytest.mark.slow] if path.stem in LARGE else []) for path in RECIPES
]


MADE_BY = {
    "minimind-26m": "minimind/pretrain_26m",
    "minimind-26m-sft": "minimind/pretrain_26m",
    "minimind-26m-dpo": "minimind/pretrain_26m",
    "minimind-104m-sft": "minimind/pretrain_104m",
    "sums": "tiny/sums",
    "tiny-kd": "tiny/kd",
    "tiny-onn-arc": "tiny_onn/arc",
    "tiny-pretrain": "tiny/pretrain",
    "tiny-r2": "tiny_r2/pretrain",
    "tiny-sparse": "tiny/pretrain",
    "tiny-tasks": "tiny/tasks",
    "tools-sft": "tiny/tools_sft",
}
"""Runs that recipes begin from, and the recipe that says what their model is."""
PUBLISHED = ("lora_medical.jsonl", "rlaif-mini.jsonl", "data/r1_mix_1024.jsonl")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """(names) -> a folder with these runs in `runs/`: models of one repetition of their layers that
    learned nothing, and tokenizers of few ids; and the files that MiniMind's recipes read.
    """
    root = tmp_path_factory.mktemp("earlier")
    chat = {"conversations": [{"from": "human", "value": "Ill?"}, {"from": "gpt", "value": "No."}]}
    for name in PUBLISHED:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps(chat) + "\n", encoding="utf-8")
    tokens = train_bpe([Path(__file__).read_text(encoding="utf-8")], 300)

    @cache
    def make(name: str) -> None:
        recipe = load(ROOT / "recipes" / f"{MADE_BY[name]}.yaml")
        grids = recipe.tokenizer is not None and recipe.tokenizer.symbols == "grids"
        assert recipe.model is not None
        lm = LM(replace(recipe.model, depth=len(recipe.model.pattern)))
        if name == "tiny-sparse":
            lm = build_transplant(lm, TransplantPlan({"experts": 16, "target_active": 8}))
        export_folder(lm, grid_tokenizer() if grids else tokens, root / "runs" / name / "final")

    def made(names: Iterable[str]) -> Path:
        for name in names:
            make(name)
        return root

    return made


@pytest.mark.parametrize("path", TRIED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_survives_a_dry_run(path, monkeypatch, tmp_path, capsys, request, earlier):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path))
    text = path.read_text(encoding="utf-8")
    if "$TINSMITH_DATA" in text:
        monkeypatch.setenv("TINSMITH_DATA", str(request.getfixturevalue("real_data")))
    config = load(path)
    begins = re.findall(r"^[^#\n]*: (?:\{path: )?runs/([\w-]+)", text, re.MULTILINE)
    foreign = "hyper-smoe" in begins  # made of weights that are on the Hub only
    if foreign:
        config = replace(config, init_from=None)
    else:
        monkeypatch.chdir(earlier(begins))
    refused = pytest.raises(UserError, match=r"Qwen3-0\.6B: no such folder")
    with refused if foreign else nullcontext():
        dry_run(config, path.stem)
    output = capsys.readouterr().out
    assert "one step of" in output
    assert ("dry run   ok" in output) != foreign
    assert "parameters" in output
    for frozen_model, folder in config.objective.frozen_models().items() if not foreign else ():
        own = folder is not None or config.lora is None
        assert (f"more for the {frozen_model}" in output) == own
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_resolved_recipe_has_the_same_plan(path, monkeypatch, tmp_path, capsys, earlier):
    """What `config show --resolved` prints is a recipe, and all it decided is in it."""
    monkeypatch.setenv("TINSMITH_DATA", "data")
    config = load(path)
    begins = re.findall(
        r"^[^#\n]*: (?:\{path: )?runs/([\w-]+)", path.read_text("utf-8"), re.MULTILINE
    )
    if "hyper-smoe" in begins:  # made of weights that are on the Hub only
        begins.remove("hyper-smoe")
        config = replace(config, init_from=None)
    monkeypatch.chdir(earlier(begins))
    written = tmp_path / "written.yaml"
    written.write_text(dump(config), encoding="utf-8")
    capsys.readouterr()
    show(written, [], [], resolved=True)
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    one, two = resolve(config), resolve(load(printed))
    assert one.recipe() == two.recipe() == two.config
    assert (one.model_config, one.lora, one.device) == (two.model_config, two.lora, two.device)
    assert tokenizer_fingerprint(one.tokenizer) == tokenizer_fingerprint(two.tokenizer)
    same = ("data", "objective", "optim", "eval", "log", "parallel", "init_from")
    assert all(getattr(one.config, name) == getattr(two.config, name) for name in same)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_is_commented_and_round_trips(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line for line in lines[:4] if line.startswith("#")]
    assert len(head) >= 2, "what it is, and what it takes"
    assert any("min" in line or "hour" in line or "day" in line for line in head), head
    config = load(path)
    assert from_dict(to_plain(config)) == config
    assert "schema: 1" in dump(config)


ANSWERING = [path for path in RECIPES if isinstance(load(path).objective, RLConfig)]


@pytest.mark.parametrize("path", ANSWERING, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_rollouts_come_out_even_and_no_step_sees_two_of_them(path):
    config = load(path)
    objective, train = config.objective, config.train
    assert isinstance(objective, RLConfig)
    objective.check_rank_batch(train.batch_size)
    parts = objective.num_minibatches * objective.num_epochs
    assert parts % train.grad_accum_steps == 0, "a rollout is a whole number of steps"
    output = re.search(r"([\d,]+) rollouts of (\d+)", path.read_text(encoding="utf-8"))
    if output:
        rollouts, answers = (int(number.replace(",", "")) for number in output.groups())
        assert rollouts == train.steps * train.grad_accum_steps / parts
        assert answers == train.batch_size * objective.num_generations


def test_both_tiny_recipes_need_nothing_but_python():
    for name in ("pretrain", "sft"):
        config = load(ROOT / "recipes" / "tiny" / f"{name}.yaml")
        assert [source.kind for source in config.data] == ["stdlib"]
        assert config.init_from is None
    text = (ROOT / "recipes" / "tiny" / "pretrain.yaml").read_text(encoding="utf-8")
    assert "  pattern:" in text
    assert os.environ.get("HF_HUB_OFFLINE") == "1"

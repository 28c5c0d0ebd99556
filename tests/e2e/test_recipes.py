"""Every recipe is valid and passes a dry run."""

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
DRY_RUN_CASES = [
    pytest.param(path, marks=[pytest.mark.slow] if path.stem in LARGE else []) for path in RECIPES
]


MODEL_RECIPES = {
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
"""Run that a recipe starts from -> recipe with the model of that run."""
DATA_FILES = ("lora_medical.jsonl", "rlaif-mini.jsonl", "data/r1_mix_1024.jsonl")


@pytest.fixture(scope="module")
def earlier_runs(tmp_path_factory):
    """`earlier_runs(names)` returns a folder with these runs in `runs/` and with the data files of
    the MiniMind recipes. The models are untrained and have one repetition of their layers, and
    the tokenizers have few ids.
    """
    root = tmp_path_factory.mktemp("earlier")
    chat = {"conversations": [{"from": "human", "value": "Ill?"}, {"from": "gpt", "value": "No."}]}
    for name in DATA_FILES:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps(chat) + "\n", encoding="utf-8")
    tokens = train_bpe([Path(__file__).read_text(encoding="utf-8")], 300)

    @cache
    def make(name: str) -> None:
        recipe = load(ROOT / "recipes" / f"{MODEL_RECIPES[name]}.yaml")
        grids = recipe.tokenizer is not None and recipe.tokenizer.symbols == "grids"
        assert recipe.model is not None
        lm = LM(replace(recipe.model, depth=len(recipe.model.pattern)))
        if name == "tiny-sparse":
            lm = build_transplant(lm, TransplantPlan({"experts": 16, "target_active": 8}))
        export_folder(lm, grid_tokenizer() if grids else tokens, root / "runs" / name / "final")

    def make_all(names: Iterable[str]) -> Path:
        for name in names:
            make(name)
        return root

    return make_all


@pytest.mark.parametrize("path", DRY_RUN_CASES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_passes_a_dry_run(path, monkeypatch, tmp_path, capsys, request, earlier_runs):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path))
    text = path.read_text(encoding="utf-8")
    if "$TINSMITH_DATA" in text:
        monkeypatch.setenv("TINSMITH_DATA", str(request.getfixturevalue("real_data")))
    config = load(path)
    needed_runs = re.findall(r"^[^#\n]*: (?:\{path: )?runs/([\w-]+)", text, re.MULTILINE)
    hub_only = "hyper-smoe" in needed_runs  # its weights are only on the Hub
    if hub_only:
        config = replace(config, init_from=None)
    else:
        monkeypatch.chdir(earlier_runs(needed_runs))
    expected_error = pytest.raises(UserError, match=r"Qwen3-0\.6B: no such folder")
    with expected_error if hub_only else nullcontext():
        dry_run(config, path.stem)
    output = capsys.readouterr().out
    assert "one step of" in output
    assert ("dry run   ok" in output) != hub_only
    assert "parameters" in output
    for frozen_model, folder in config.objective.frozen_models().items() if not hub_only else ():
        separate = folder is not None or config.lora is None
        assert (f"more for the {frozen_model}" in output) == separate
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_resolved_recipe_has_the_same_plan(path, monkeypatch, tmp_path, capsys, earlier_runs):
    """`config show --resolved` prints a complete recipe that resolves to the same plan."""
    monkeypatch.setenv("TINSMITH_DATA", "data")
    config = load(path)
    needed_runs = re.findall(
        r"^[^#\n]*: (?:\{path: )?runs/([\w-]+)", path.read_text("utf-8"), re.MULTILINE
    )
    if "hyper-smoe" in needed_runs:  # its weights are only on the Hub
        needed_runs.remove("hyper-smoe")
        config = replace(config, init_from=None)
    monkeypatch.chdir(earlier_runs(needed_runs))
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
    assert len(head) >= 2, "what the recipe does, and how long it takes"
    assert any("min" in line or "hour" in line or "day" in line for line in head), head
    config = load(path)
    assert from_dict(to_plain(config)) == config
    assert "schema: 1" in dump(config)


RL_RECIPES = [path for path in RECIPES if isinstance(load(path).objective, RLConfig)]


@pytest.mark.parametrize("path", RL_RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_rollout_feeds_a_whole_number_of_steps(path):
    config = load(path)
    objective, train = config.objective, config.train
    assert isinstance(objective, RLConfig)
    objective.check_rank_batch(train.batch_size)
    parts = objective.num_minibatches * objective.num_epochs
    assert parts % train.grad_accum_steps == 0, "a rollout is a whole number of steps"
    comment = re.search(r"([\d,]+) rollouts of (\d+)", path.read_text(encoding="utf-8"))
    if comment:
        rollouts, completions = (int(number.replace(",", "")) for number in comment.groups())
        assert rollouts == train.steps * train.grad_accum_steps / parts
        assert completions == train.batch_size * objective.num_generations


def test_tiny_pretrain_and_sft_train_on_the_standard_library_only():
    for name in ("pretrain", "sft"):
        config = load(ROOT / "recipes" / "tiny" / f"{name}.yaml")
        assert [source.kind for source in config.data] == ["stdlib"]
        assert config.init_from is None
    text = (ROOT / "recipes" / "tiny" / "pretrain.yaml").read_text(encoding="utf-8")
    assert "  pattern:" in text
    assert os.environ.get("HF_HUB_OFFLINE") == "1"

"""Runs that train adapters: what they leave, and that everything opens it."""

import json
from pathlib import Path

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file

import tinsmith
from tinsmith.cli import app
from tinsmith.config import from_dict
from tinsmith.core.errors import UserError
from tinsmith.hub.peft.adapters import merge_adapters, read_adapters
from tinsmith.nn.model import LM
from tinsmith.objectives.base import Objective
from tinsmith.objectives.pretrain import Pretrain
from tinsmith.train.dryrun import dry_run
from tinsmith.train.frozen import load_frozen_models
from tinsmith.train.trainer import train

LAYER = {
    "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2},
    "feed_forward": {"kind": "swiglu", "hidden_dim": 48},
}
COMMON = {
    "data": {"kind": "tasks", "count": 300, "digits": 2, "length": 4},
    "objective": {"kind": "pretrain"},
    "optim": {"schedule": {"kind": "wsd", "warmup": 2}},
    "train": {
        **{"steps": 6, "seq_len": 48, "batch_size": 4, "precision": "fp32"},
        **{"save_every": 2, "eval_every": 3, "sample_every": 6},
    },
    "eval": {"max_samples": 4, "max_new_tokens": 4},
    "log": {"every": 1},
}
MODEL = {"vocab_size": 320, "dim": 32, "depth": 2, "max_seq_len": 64, "pattern": [LAYER]}
SECTION = {"targets": ["q_proj", "v_proj", "down_proj"], "rank": 4, "alpha": 8, "dropout": 0.1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A pretrained run and one that trains adapters of it: their folders."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINSMITH_RUNS", str(root))
        tokenizer = {"train": {"vocab_size": 320}}
        base = train(from_dict(COMMON | {"model": MODEL, "tokenizer": tokenizer}), "base")
        recipe = COMMON | {"init_from": str(base), "lora": SECTION}
        adapted = train(from_dict(recipe), "adapted")
    return base, adapted


def cli(arguments: list[str]) -> None:
    typer.main.get_command(app).main(arguments, standalone_mode=False)


def states(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    return {
        int(path.name[5:]): load_file(path / "model.safetensors")
        for path in sorted((folder / "checkpoints").glob("step-*"))
    }


def same(one: LM, other: LM) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_base_is_unchanged_to_the_bit_and_adapters_move(runs):
    base = dict(tinsmith.load(runs[0])[0].named_parameters())
    saved = states(runs[1])
    assert len(saved) > 1
    for state in saved.values():
        assert all(torch.equal(state[name], base[name]) for name in base)
        assert {name for name in state if ".lora." not in name} == base.keys()
    first, last = (saved[step] for step in (min(saved), max(saved)))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert moved == {name for name in first if ".lora." in name}
    assert len(moved) == 2 * 2 * 3


def test_moments_are_kept_of_adapters_alone(runs):
    newest = max((runs[1] / "checkpoints").glob("step-*"))
    names = {name.partition("|")[0] for name in load_file(newest / "optim.safetensors")}
    assert names == {name for name in load_file(newest / "model.safetensors") if ".lora." in name}


def test_final_is_the_merged_model_and_so_is_the_last_checkpoint(runs):
    final, tokenizer = tinsmith.load(runs[1])
    assert tokenizer is not None
    newest = max((runs[1] / "checkpoints").glob("step-*"))
    whole, _ = tinsmith.load(newest)
    assert same(final, whole)
    assert not same(final, tinsmith.load(runs[0])[0])
    assert json.loads((runs[1] / "final" / "config.json").read_text())["model_type"] == "llama"
    half, _ = tinsmith.load(newest, dtype="bf16")
    assert half.blocks[0].mixer.q_proj.weight.dtype == torch.bfloat16
    assert same(half, final.bfloat16())


def test_adapter_beside_final_makes_final_of_the_base(runs):
    base, _ = tinsmith.load(runs[0])
    made = read_adapters(runs[1] / "final" / "adapter", base.config)
    merge_adapters(base, made)
    assert same(base, tinsmith.load(runs[1])[0])
    described = json.loads((runs[1] / "final" / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(runs[0] / "final")
    assert (described["r"], described["lora_alpha"], described["lora_dropout"]) == (4, 8.0, 0.1)


def test_a_checkpoint_says_its_model_though_the_recipe_does_not(runs):
    newest = max((runs[1] / "checkpoints").glob("step-*"))
    assert yaml.safe_load((newest / "config.yaml").read_text())["model"]["dim"] == 32


def test_every_verb_opens_a_run_of_adapters_and_a_checkpoint_of_it(runs, tmp_path, capsys):
    newest = max((runs[1] / "checkpoints").glob("step-*"))
    for place in (runs[1], newest):
        cli(["generate", str(place), "-p", "1 +", "--max-new-tokens", "4", "--temperature", "0"])
    first, second = capsys.readouterr().out.split("1 +")[1:]
    assert first == second
    cli(["eval", str(newest), "--tasks", "bpb", "--limit", "2", "--json"])
    assert "bpb" in capsys.readouterr().out


def test_adapters_are_exported_and_merged_by_a_verb(runs, tmp_path):
    newest = max((runs[1] / "checkpoints").glob("step-*"))
    for place, name in ((newest, "checkpoint"), (runs[1], "run")):
        cli(["export", str(place), str(tmp_path / name), "--to", "peft"])
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            wanted = (runs[1] / "final" / "adapter" / file).read_bytes()
            assert (tmp_path / name / file).read_bytes() == wanted
    merged = tmp_path / "merged"
    cli(["export", str(runs[0]), str(merged), "--adapter", str(tmp_path / "run")])
    assert same(tinsmith.load(merged)[0], tinsmith.load(runs[1])[0])


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (["--to", "gguf"], "--to gguf: only hf and peft are known"),
        (["--to", "peft"], "has no adapters; only a run with a lora section has"),
        (["--to", "peft", "--adapter", "x"], "--adapter: merges adapters into a model"),
        (["--adapter", "absent"], "absent/adapter_config.json: no such file"),
    ],
)
def test_export_says_what_it_cannot_do(runs, tmp_path, arguments, output):
    with pytest.raises(UserError, match=output):
        cli(["export", str(runs[0]), str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_a_run_can_begin_from_a_checkpoint_with_adapters(runs, monkeypatch):
    monkeypatch.setenv("TINSMITH_RUNS", str(runs[0].parent))
    newest = max((runs[1] / "checkpoints").glob("step-*"))
    short = COMMON | {"train": COMMON["train"] | {"steps": 1}}
    third = train(from_dict(short | {"init_from": str(newest), "lora": SECTION}), "third")
    began, _ = tinsmith.load(newest)
    left = load_file(third / "checkpoints" / "step-00000001" / "model.safetensors")
    for name, tensor in began.state_dict().items():
        assert torch.equal(left.get(name, tensor), tensor), name
    assert set(left) > set(began.state_dict()) - {"head.weight"}


def test_the_header_and_the_dry_run_say_what_is_trained(runs, monkeypatch, capsys):
    monkeypatch.setenv("TINSMITH_RUNS", str(runs[0].parent))
    output = "1,536 trained, 25,760 frozen | rank 4, alpha 8 on q_proj, v_proj, down_proj"
    assert output in (runs[1] / "log.txt").read_text()
    dry_run(from_dict(COMMON | {"init_from": str(runs[0]), "lora": SECTION}), "dry")
    printed = capsys.readouterr().out
    assert output in printed
    assert "matrix              1,536 in 12 tensors" in printed
    assert "dry run   ok" in printed


@pytest.mark.parametrize("verb", ["train", "dry"])
def test_targets_that_are_not_there_are_one_line_and_leave_the_name_free(runs, monkeypatch, verb):
    monkeypatch.setenv("TINSMITH_RUNS", str(runs[0].parent))
    section = SECTION | {"targets": ["query"]}
    config = from_dict(COMMON | {"init_from": str(runs[0]), "lora": section})
    with pytest.raises(UserError, match=r"lora\.targets: 'query' names no linear layer"):
        train(config, "wrong") if verb == "train" else dry_run(config, "wrong")
    assert not (runs[0].parent / "wrong").exists()


@pytest.mark.parametrize(
    ("section", "output"),
    [
        ({"rank": 0}, "lora: rank=0 must be at least 1"),
        ({"targets": []}, "lora: targets must name at least one"),
        ({"rnak": 4}, "lora.rnak: unknown key. Did you mean 'rank'"),
        ({"dropout": 1.5}, "lora: dropout=1.5 must be"),
    ],
)
def test_a_section_that_cannot_be_is_refused_with_its_key(section, output):
    with pytest.raises(UserError, match=output.replace(".", r"\.")):
        from_dict(COMMON | {"model": MODEL, "lora": section})


def test_a_frozen_model_that_is_the_policy_at_first_is_not_copied(runs):
    class Scored(Pretrain):
        def frozen_models(self):
            return {"reference": None, "teacher": str(runs[0])}

    from tinsmith.nn import lora

    policy, tokenizer = tinsmith.load(runs[0])
    device = torch.device("cpu")
    assert load_frozen_models(Scored(), policy, tokenizer, device).keys() == {
        "reference",
        "teacher",
    }
    lora.add_adapters(policy, lora.LoRA())
    assert load_frozen_models(Scored(), policy, tokenizer, device).keys() == {"teacher"}
    assert Objective().frozen_models.get("reference") is None

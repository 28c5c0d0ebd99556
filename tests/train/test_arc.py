"""Whole runs on ARC puzzles in two stages: SFT with teacher forcing, then EAVI from its model."""

import json

import pytest
import torch

from tinsmith.config import from_dict
from tinsmith.core.errors import UserError
from tinsmith.core.log import read_metrics
from tinsmith.core.parse import to_plain
from tinsmith.hub.load import load
from tinsmith.train import checkpoint
from tinsmith.train.dryrun import dry_run
from tinsmith.train.trainer import train
from tinsmith.verbs.evaluate import EvalOptions, evaluate

NSA = {
    **{"kind": "nsa", "heads": 4, "kv_heads": 2, "compress_block": 4, "compress_stride": 4},
    **{"select_block": 4, "select_count": 3, "window": 16},
}
DYN_MOE = {
    "kind": "dyn_moe",
    "experts": 4,
    "hidden_dim": 16,
    "target_active": 2,
    "reset_interval": 2,
}
STAGES = {"first": {"kind": "sft", "reads": "answers"}, "second": {"kind": "eavi"}}


@pytest.fixture(scope="module")
def recipe():
    """A small NSA model with dropout and expert resets; evaluation and samples during training."""
    return {
        "model": {
            **{"vocab_size": 18, "dim": 32, "depth": 2, "max_seq_len": 128},
            "pattern": [{"mixer": NSA, "feed_forward": DYN_MOE}],
            "dropout": {"residual": 0.1},
        },
        "data": {
            **{
                "kind": "arc",
                "count": 60,
                "max_grid_size": 3,
                "demonstrations": 2,
                "validation": 0.2,
            },
            "rules": ["recolour", "mirror", "fill", "half"],
        },
        "objective": STAGES["first"],
        "optim": {"schedule": {"kind": "wsd", "warmup": 2}},
        "train": {
            **{
                "steps": 6,
                "seq_len": 96,
                "batch_size": 4,
                "grad_accum_steps": 2,
                "precision": "fp32",
            },
            **{"save_every": 2, "eval_every": 3, "sample_every": 3},
        },
        "eval": {"max_samples": 8, "max_new_tokens": 8},
        "log": {"every": 1},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory, recipe):
    def train_stage(stage, name, start=None, resume_from=None, **changed):
        data = recipe | {"objective": STAGES[stage]} | changed
        if start is not None:
            del data["model"]
            data |= {"init_from": str(start)}
        return train(from_dict(data), name, resume_from=resume_from)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINSMITH_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield train_stage


def records(folder, *kinds):
    """Records of metrics.jsonl of these kinds, without timings."""
    timings = ("tokens_per_second", "eta_seconds")
    found = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] in kinds]
    return [{key: value for key, value in line.items() if key not in timings} for line in found]


@pytest.fixture(scope="module")
def stages(run):
    """Stage name -> (folder of its finished run, folder that it was initialised from)."""
    first = run("first", "first")
    return {"first": (first, None), "second": (run("second", "second", first), first)}


@pytest.mark.parametrize("stage", STAGES)
def test_T2_resume_is_bit_exact(stage, stages, run):
    whole, start = stages[stage]
    middle = whole / "checkpoints" / "step-00000004"
    resumed = run(stage, f"resumed-{stage}", start, resume_from=middle)
    for name in ("model", "optim", "rng-00000"):
        files = [
            folder / "checkpoints" / "step-00000006" / f"{name}.safetensors"
            for folder in (whole, resumed)
        ]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    kinds = ("train", "eval", "samples", "routing")
    expected = [record for record in records(whole, *kinds) if record["step"] > 4]
    assert records(resumed, *kinds) == expected


def test_the_second_stage_starts_from_the_weights_of_the_first_and_logs_both_losses(stages):
    (first, _), (second, _) = stages["first"], stages["second"]
    train_records = records(second, "train")
    assert {
        "teacher_forcing_loss",
        "alignment_loss",
        "alignment_loss_equal_shape",
        "sdl",
    } <= train_records[0].keys()
    start = checkpoint.load(first / "checkpoints" / "step-00000006").model["embed.weight"]
    later = checkpoint.load(second / "checkpoints" / "step-00000004").model["embed.weight"]
    # AdamW moves a weight by about its lr of 0.003 a step; another init differs by 0.06 somewhere
    assert 0 < (later - start).abs().max() < 0.015
    card = (second / "final" / "README.md").read_text(encoding="utf-8")
    assert "nats per token of answers after the model's own beginnings" in card
    lm, tokenizer = load(second)
    assert tokenizer is not None
    assert tokenizer.vocab_size == lm.config.vocab_size == 18
    sample = records(second, "samples")[-1]["samples"][0]["prompt"]
    assert sample.endswith("<|im_start|><|solution|>")


def test_eval_reports_seen_and_held_out_rules_and_draws_a_picture(
    stages, tmp_path, capsys, real_data
):
    """`tinsmith eval RUN --tasks arc_agi`. Held-out rules combine kinds seen in training."""
    run = stages["second"][0]
    evaluate(str(run), "arc_agi", EvalOptions(None, None, 3), "cpu", None, True)
    results = json.loads(capsys.readouterr().out)
    assert list(results) == ["arc_agi seen", "arc_agi held back"]
    assert results["arc_agi seen"]["outputs"] == 3
    assert results["arc_agi seen"]["by_task"].keys() == {"recolour-0", "mirror-1", "fill-2"}
    held_back = {f"recolour+fill-{index}" for index in range(3)}
    assert results["arc_agi held back"]["by_task"].keys() == held_back
    assert (run / "arc_agi.png").read_bytes().startswith(b"\x89PNG")
    tasks = real_data / "arc_agi1" / "training_small10.jsonl"
    evaluate(str(run / "final"), "arc_agi", EvalOptions(tasks, None, 2), "cpu", None, False)
    assert "arc_agi training_small10" in capsys.readouterr().out


def test_the_exported_tokenizer_loads_in_transformers(stages):
    from transformers import AutoTokenizer

    hf_tokenizer = AutoTokenizer.from_pretrained(stages["second"][0] / "final")
    assert hf_tokenizer("<|solution|>01\n2<|im_end|>").input_ids == [13, 0, 1, 15, 2, 11]


def test_arc_data_select_the_grid_tokenizer_and_the_recipe_round_trips(recipe):
    config = from_dict(recipe)
    assert config.tokenizer is not None
    assert config.tokenizer.symbols == "grids"
    assert from_dict(to_plain(config)) == config
    with pytest.raises(UserError, match=r"give exactly one of `tokenizer.train`"):
        from_dict(recipe | {"tokenizer": {"symbols": "grids", "path": "x"}})


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_runs_a_step(stage, recipe, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path / "none"))
    dry_run(from_dict(recipe | {"objective": STAGES[stage]}), "x")
    assert "dry run   ok" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_eavi_trains_on_ordinary_chats(run, recipe):
    model = {**recipe["model"], "vocab_size": 320, "max_seq_len": 160}
    data = {"kind": "tasks", "tasks": ["copy"], "count": 60, "length": 3, "reasoning": False}
    train_section = {**recipe["train"], "seq_len": 160}
    folder = run("second", "chats", model=model, data=data, train=train_section)
    last = records(folder, "train")[-1]
    assert "alignment_loss" in last
    assert "alignment_loss_equal_shape" not in last


def test_eavi_refuses_fsdp(recipe):
    with pytest.raises(UserError, match=r"parallel.kind=fsdp: this objective"):
        from_dict(recipe | {"objective": {"kind": "eavi"}, "parallel": {"kind": "fsdp"}})


def test_a_bad_task_leaves_no_run_behind(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path / "runs"))
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"train": [], "test": []}), encoding="utf-8")
    with pytest.raises(UserError, match="task bad: no demonstrations"):
        run("first", "bad", data={"kind": "arc", "path": str(path)})
    runs = tmp_path / "runs"
    assert not (runs / "bad").exists()
    assert not [each for each in (runs / ".data").iterdir() if not each.name.startswith(".")]


def test_the_excursion_does_not_change_the_random_state_of_training(run, monkeypatch):
    """A run without excursions draws the same dropout masks: its final random state is the same."""
    from tinsmith.objectives import eavi

    whole = run("second", "whole")

    def no_excursion(lm, ids, span, *, temperature, hard):
        shape = (len(ids), int(span.length_B.max()), lm.config.vocab_size)
        return torch.full(shape, 1 / lm.config.vocab_size)

    monkeypatch.setattr(eavi, "excursion", no_excursion)
    skipped = run("second", "skipped")
    files = [
        folder / "checkpoints" / "step-00000006" / "rng-00000.safetensors"
        for folder in (whole, skipped)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert records(whole, "train") != records(skipped, "train")

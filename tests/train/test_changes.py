"""T1 to T3, T8, T9, T16, T17, T26: what a resumed run may find changed, and who may train it."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from tests.hf_folders import byte_level, sentencepiece, write_source
from tinsmith.config import from_dict
from tinsmith.core.errors import UserError
from tinsmith.train.dryrun import dry_run
from tinsmith.train.run_dir import RunLock
from tinsmith.train.trainer import train

LAYER = {
    "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2},
    "feed_forward": {"kind": "swiglu", "hidden_dim": 48},
}
MODEL = {"vocab_size": 320, "dim": 32, "depth": 2, "max_seq_len": 64, "pattern": [LAYER]}
STEPS = {
    **{"steps": 4, "seq_len": 64, "batch_size": 2, "precision": "fp32"},
    **{"save_every": 2, "eval_every": 2, "keep": {"last": 9}},
}


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def write_texts(path, word):
    path.write_text("".join(json.dumps({"text": f"{word} {n} " * 20}) + "\n" for n in range(60)))


def pretrain(path, **changes):
    """Return a recipe that trains model and tokenizer on the texts of a file."""
    return {
        "model": MODEL,
        "data": {"kind": "text", "path": str(path)},
        "objective": {"kind": "pretrain"},
        "train": STEPS | changes,
        "eval": {"max_samples": 2, "max_new_tokens": 2},
    }


def chats(path, init_from, objective, **changes):
    """Return a recipe that fine-tunes `init_from` on pairs or chats in a file."""
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]
    pair = {"chosen": turn, "rejected": [turn[0], {"role": "assistant", "content": "no"}]}
    record = pair if objective["kind"] == "dpo" else {"messages": turn}
    path.write_text("".join(json.dumps(record) + "\n" for _ in range(40)))
    return {
        "init_from": str(init_from),
        "data": {"kind": "chats", "path": str(path)},
        "objective": objective,
        "train": STEPS | changes,
        "eval": {"max_samples": 2, "max_new_tokens": 2},
    }


def shift_weights(folder):
    """Change the weights of a model folder."""
    path = folder / "model.safetensors"
    save_file({k: v + 0.1 for k, v in load_file(path).items()}, path, metadata={"format": "pt"})


def test_T1_a_resume_with_a_changed_tokenizer_is_refused_in_one_line(tmp_path):
    text = tmp_path / "text.jsonl"
    write_texts(text, "one")
    train(from_dict(pretrain(text)), "run")
    write_texts(text, "zebra")
    for accept in (False, True):
        config = from_dict(pretrain(text, steps=6))
        if accept:  # new data, encoded by the tokenizer of the checkpoint
            train(config, "run", resume=True, accept_changes=True)
            continue
        with pytest.raises(UserError, match="the tokenizer of this run has changed") as caught:
            train(config, "run", resume=True)
        assert "--accept-changes" in str(caught.value)
        assert "\n" not in str(caught.value)
    root = tmp_path / "runs" / "run" / "checkpoints"
    tokenizers = [(root / f"step-{n:08d}" / "tokenizer.json").read_bytes() for n in (2, 4, 6)]
    assert tokenizers[0] == tokenizers[1] == tokenizers[2]


def test_T1_a_resume_with_changed_data_is_refused_unless_it_is_accepted(tmp_path):
    base = write_source(tmp_path / "base", "llama", byte_level())
    path = tmp_path / "chats.jsonl"
    recipe = chats(path, base, {"kind": "sft"})
    train(from_dict(recipe), "run")
    path.write_text(path.read_text() + path.read_text().replace("yes", "no"))
    longer = from_dict(recipe | {"train": STEPS | {"steps": 6}})
    with pytest.raises(UserError, match="the data of this run has changed"):
        train(longer, "run", resume=True)
    state = json.loads(
        (train(longer, "run", resume=True, accept_changes=True) / "checkpoints" / "step-00000006")
        .joinpath("state.json")
        .read_text()
    )
    assert state["fingerprints"].keys() == {"tokenizer", "data"}


@pytest.mark.parametrize("objective", [{"kind": "dpo"}, {"kind": "kd"}])
def test_T2_a_resume_with_a_changed_reference_model_is_refused(tmp_path, objective):
    base = write_source(tmp_path / "base", "llama", byte_level())
    teacher = write_source(tmp_path / "teacher", "llama", byte_level())
    changed, name = (base, "reference") if objective["kind"] == "dpo" else (teacher, "teacher")
    if objective["kind"] == "kd":
        objective = objective | {"teacher": str(teacher)}
    recipe = chats(tmp_path / "data.jsonl", base, objective)
    train(from_dict(recipe), "run")
    shift_weights(changed)
    longer = from_dict(recipe | {"train": STEPS | {"steps": 6}})
    with pytest.raises(UserError, match=f"the {name} of this run has changed"):
        train(longer, "run", resume=True)
    train(longer, "run", resume=True, accept_changes=True)


def test_T17_a_resume_does_not_need_init_from(tmp_path):
    base = write_source(tmp_path / "base", "llama", byte_level(None))
    recipe = chats(tmp_path / "data.jsonl", base, {"kind": "sft"}) | {"lora": {"rank": 2}}
    whole = train(from_dict(recipe), "whole")
    shutil.rmtree(base)
    first = whole / "checkpoints" / "step-00000002"
    resumed = train(from_dict(recipe), "resumed", resume_from=first)
    last = "checkpoints/step-00000004/model.safetensors"
    one, two = (load_file(folder / last) for folder in (whole, resumed))
    assert one.keys() == two.keys()
    assert all(one[key].equal(two[key]) for key in one)


def test_T26_the_log_names_what_init_from_took(tmp_path, capsys, runs):
    text = tmp_path / "text.jsonl"
    write_texts(text, "one")
    base = train(from_dict(pretrain(text)), "base")
    data = tmp_path / "data.jsonl"
    train(from_dict(chats(data, base, {"kind": "sft"})), "final")
    assert f"init       from {base / 'final'}" in capsys.readouterr().out
    shutil.rmtree(base / "final")
    train(from_dict(chats(data, base, {"kind": "sft"})), "checkpoint")
    assert f"init       from {base / 'checkpoints' / 'step-00000004'}" in capsys.readouterr().out


def test_T8_a_run_is_trained_by_one_process_at_a_time(tmp_path, runs):
    text = tmp_path / "text.jsonl"
    write_texts(text, "one")
    run = train(from_dict(pretrain(text)), "run")
    code = (
        "import sys, pathlib; from tinsmith.train.run_dir import RunLock\n"
        "lock = RunLock(pathlib.Path(sys.argv[1])); print('locked', flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=rf"process {holder.pid} on .* trains this run"):
        train(from_dict(pretrain(text, steps=6)), "run", resume=True)
    holder.communicate("\n", timeout=60)
    train(from_dict(pretrain(text, steps=6)), "run", resume=True)
    RunLock(run).release()
    assert (run / ".lock").read_text() == ""


def test_T9_the_last_line_tells_last_and_best_apart(tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.jsonl"
    write_texts(text, "one")
    losses = iter([1.0, 2.0, float("nan")])

    def evaluate(run, source):
        return {"loss": (loss := next(losses)), "bpb": loss}

    monkeypatch.setattr("tinsmith.train.hooks.evaluate_validation", evaluate)
    train(from_dict(pretrain(text, steps=6)), "run")
    output = capsys.readouterr().out
    assert re.search(r"finished bpb nan \(step 6; best bpb 1\.000 at step 2\)", output)
    assert output.count("(best)") == 1


def test_T3_the_header_warns_of_chats_that_are_longer_than_a_row(tmp_path, capsys):
    base = write_source(tmp_path / "base", "llama", byte_level())
    path = tmp_path / "data.jsonl"
    train(from_dict(chats(path, base, {"kind": "sft"}, seq_len=16)), "short")
    output = capsys.readouterr().out
    assert re.search(r"warning \d+ chats are longer than train\.seq_len=16", output)
    train(from_dict(chats(path, base, {"kind": "sft"})), "long")
    assert "are longer than" not in capsys.readouterr().out


def test_T16_a_dry_run_refuses_data_and_teachers_that_the_run_refuses(tmp_path, capsys):
    base = write_source(tmp_path / "base", "llama", byte_level())
    other = write_source(tmp_path / "other", "llama", sentencepiece())
    path = tmp_path / "data.jsonl"
    recipe = chats(path, base, {"kind": "sft"})
    dry_run(from_dict(recipe), "good")
    assert "40 of the first 40 chats can be used" in capsys.readouterr().out
    good = path.read_text()
    path.write_text("not json\n" + good)
    dry_run(from_dict(recipe), "partly")
    assert "40 of the first 41 chats can be used; " in capsys.readouterr().out
    path.write_text('{"label": true}\n' * 3)
    with pytest.raises(UserError, match=r"none of the first 3 records of '.*' can be used"):
        dry_run(from_dict(recipe), "bad")
    path.write_text(good)
    teacher = {"kind": "kd", "teacher": str(other)}
    with pytest.raises(UserError, match=r"objective\.teacher: .* gives other ids"):
        dry_run(from_dict(recipe | {"objective": teacher}), "teacher")

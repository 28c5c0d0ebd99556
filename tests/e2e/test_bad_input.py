"""Bad input gives exit code 2 and one line with file, line or key and what to do."""

import json
import os
from pathlib import Path

import pytest
import yaml

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "pretrain.yaml"
MIXER = "model.pattern.0.mixer"


def one_line(output: str) -> str:
    """Assert that the output has exactly one error line and return it."""
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output
    return lines[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "missing.yaml"], "missing.yaml: no such file"),
        (["train", RECIPE, "train.stepz=1"], "train.stepz: unknown key. Did you mean 'steps'?"),
        (["train", RECIPE, "train.steps=many"], "train.steps: "),
        (["train", RECIPE, "model.pattern.0.mixer.heads=3"], "kv_heads"),
        (["train", RECIPE, "model.dim=130"], "dim=130 must be a multiple of heads=4"),
        (["train", RECIPE, f"{MIXER}={{kind: nsa, heads: 4, compress_stride: 12}}"], "stride=12"),
        (
            ["train", RECIPE, f"{MIXER}={{kind: dsa, heads: 4, index_topk: 0}}"],
            "index_topk=0 must be at least",
        ),
        (["train", RECIPE, "model.residual={kind: mhyper, streams: 1}"], "streams=1 must be at"),
        (["train", RECIPE, "model.positions=learned", "train.seq_len=10k"], "train.seq_len=10000"),
        (["train", RECIPE, "model.vocab_size=600"], "model.vocab_size: 600 is smaller than"),
        (["train", RECIPE, "data={kind: text, path: nowhere}"], "nowhere does not exist"),
        (["train", RECIPE, "data={kind: arc, path: nowhere}"], "nowhere does not exist"),
        (
            ["train", RECIPE, "data={kind: arc, min_grid_size: 2}"],
            "min_grid_size=2 must be from 3 to 6",
        ),
        (["train", RECIPE, "nonsense"], "overrides look like train.steps=100"),
        (["train", RECIPE, "--name", "../up"], "a run's name is one word"),
        (["train", RECIPE, "--resume"], "--name"),
        (["train", RECIPE, "train.device=warp"], "train.device: 'warp'"),
        (["train", RECIPE, "--name", "x", "--resume-from", "no"], "no checkpoint there"),
        (["train", RECIPE, "init_from=gone/away/far"], "gone/away/far"),
        (["train", RECIPE, "eval.tasks=[gone.jsonl]"], "eval.tasks: gone.jsonl is neither"),
        (["train", RECIPE, "eval.tasks=[gone.jsonl]", "--dry-run"], "eval.tasks: gone.jsonl"),
        (["chat", "nowhere", "--max-new-tokens", "0"], "--max-new-tokens: at least 1"),
        (["generate", "nowhere/at/all", "-p", "x"], "nowhere/at/all"),
        (["eval", "nowhere/at/all"], "nowhere/at/all"),
        (["transplant", "nowhere/at/all", "out"], "nowhere/at/all"),
        (["transplant", "nowhere/at/all", "out", "--init", "warm"], "--init warm: only random"),
        (["transplant", "nowhere/at/all", "out", "experts"], "'experts': overrides look like"),
        (["plot", "nowhere"], "nowhere: has no metrics.jsonl"),
        (["config", "check", "missing.yaml"], "missing.yaml: no such file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_gives_one_line_and_exit_code_2(words, expected, shell):
    line = one_line(shell(*words, code=2))
    assert expected in line
    assert len(line) < 400


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "this file is empty"),
        (b"\xff\xfe", "not UTF-8"),
        (b"model: {", "broken.yaml:"),
        (b"- 1\n", "keys and values"),
    ],
)
def test_a_broken_recipe_gives_an_error_with_its_file(content, expected, shell):
    (shell.folder / "broken.yaml").write_bytes(content)
    assert expected in one_line(shell("train", "broken.yaml", code=2))


def test_a_run_name_that_exists_is_refused_with_both_remedies(shell):
    taken = shell.folder / "runs" / "taken"
    taken.mkdir(parents=True)
    (taken / "precious").write_text("here")
    line = one_line(shell("train", RECIPE, "--name", "taken", code=2))
    assert "--resume" in line
    assert "--name" in line
    assert (taken / "precious").read_text() == "here"


def test_a_run_that_failed_to_start_leaves_its_name_free(shell):
    (shell.folder / "empty.txt").write_text("")
    words = ["train", RECIPE, "--name", "again", "data={kind: text, path: empty.txt}"]
    for _ in range(2):
        assert "empty.txt" in one_line(shell(*words, code=2))
    assert not (shell.folder / "runs" / "again").exists()


def test_T9_bad_lines_are_rejected_with_file_and_line_and_counted(shell):
    lines = [json.dumps({"text": f"number {i} of many, all of them good"}) for i in range(60)]
    lines[10], lines[20] = "{broken", json.dumps({"body": "wrong field"})
    (shell.folder / "some.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe["data"] = {"kind": "text", "path": "some.jsonl"}
    recipe["tokenizer"] = {"train": {"vocab_size": 300}}
    (shell.folder / "some.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    output = shell("prepare", "some.yaml")
    assert "2 lines rejected" in output
    rejects = shell.folder / output.split(" prepared  ")[1].strip() / "rejects.jsonl"
    records = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [record["line"] for record in records] == [11, 21]
    failing = shell("prepare", "some.yaml", "data.on_bad_line=fail", code=2)
    assert "some.jsonl:11" in one_line(failing)


def test_resume_with_another_model_is_refused(shell):
    small = ("data={kind: tasks, count: 50}", "tokenizer.train.vocab_size=320")
    small += ("model.vocab_size=320", "train.steps=1", "train.seq_len=32", "eval.max_samples=1")
    shell("train", RECIPE, *small, "--name", "begun")
    again = ("runs/begun/config.yaml", "train.steps=2", "--name", "begun", "--resume")
    output = shell("train", *again, "model.depth=3", code=2)
    assert "was begun with model.depth: 4, not 3" in one_line(output)
    assert "finished" in shell("train", *again)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_missing_permission_gives_one_line(shell):
    closed = shell.folder / "closed"
    closed.mkdir(mode=0o500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINSMITH_RUNS", str(closed / "runs"))
        assert "cannot be made" in one_line(shell("train", RECIPE, "--name", "x", code=2))


def test_a_runs_folder_that_is_a_file_gives_one_line(shell):
    (shell.folder / "plain").write_text("a file")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINSMITH_RUNS", "plain")
        line = one_line(shell("train", RECIPE, "--name", "x", code=2))
    assert "cannot be made" in line
    assert "TINSMITH_RUNS" in line


def test_N3_a_long_warm_up_is_a_warning_of_train_and_dry_run(shell):
    small = ("data={kind: tasks, count: 50}", "tokenizer.train.vocab_size=320")
    small += ("model.vocab_size=320", "train.steps=2", "train.seq_len=32", "eval.max_samples=1")
    for words in (("--dry-run",), ("--name", "warm")):
        output = " ".join(shell("train", RECIPE, *small, *words).split())
        assert "optim.schedule.warmup: 20 steps in a run of 2" in output

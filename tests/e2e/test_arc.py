"""ARC on the command line: a short run on generated puzzles, and evaluation on task files."""

import json
from pathlib import Path

import pytest
import yaml

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tiny_onn" / "arc_dense.yaml"
SHORT = [
    *(
        "train.steps=2",
        "train.batch_size=4",
        "train.save_every=2",
        "data.count=60",
        "eval.max_samples=4",
    ),
    *("model.dim=32", "model.depth=1"),
]
PAIR = {"input": [[1, 0], [0, 0]], "output": [[2, 0], [0, 0]]}
TEST_PAIR = {"input": [[0, 1], [0, 0]]}


@pytest.fixture(scope="module")
def run(shell):
    shell("train", RECIPE, "--name", "puzzles", *SHORT)
    return "runs/puzzles"


@pytest.fixture
def tasks(tmp_path):
    """Two task files of the same name in different folders, and a file with their solutions."""
    for part in ("easy", "hard"):
        (tmp_path / "tasks" / part).mkdir(parents=True)
        task = {"train": [PAIR], "test": [TEST_PAIR, TEST_PAIR]}
        (tmp_path / "tasks" / part / "first.json").write_text(json.dumps(task))
    solutions = {"first": [[[0, 2], [0, 0]]] * 2}
    (tmp_path / "solutions.json").write_text(json.dumps(solutions))
    return tmp_path


def test_eval_prints_every_task_and_the_total_and_draws_a_picture(shell, run):
    output = shell("eval", run, "--tasks", "arc_agi", "--limit", "3").splitlines()
    totals = [line for line in output if line.startswith(" arc_agi ")]
    assert [line.split("score")[0].strip() for line in totals] == [
        "arc_agi seen",
        "arc_agi held back",
    ]
    assert all("tasks 3  outputs 3" in line for line in totals)
    assert sum(line.startswith("   ") and " score " in line for line in output) == 6
    picture = shell.folder / run / "arc_agi.png"
    assert str(Path(run) / "arc_agi.png") in " ".join(output)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_eval_reads_a_folder_of_tasks_with_its_solutions(shell, run, tasks):
    arguments = ("--data", tasks / "tasks", "--solutions", tasks / "solutions.json")
    output = shell("eval", run, "--tasks", "arc_agi", *arguments, "--json")
    result = json.loads(output[output.index("{") :])["arc_agi tasks"]
    assert (result["tasks"], result["outputs"]) == (2, 4)
    assert result["by_task"].keys() == {"first", "first#2"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data", "tasks"], "test 1 has no output, and there is no solution for it"),
        (["--solutions", "solutions.json"], "--solutions: needs --data"),
        (["--seq-len", "64"], "--seq-len 64: applies to --tasks bpb"),
        (["--data", "nowhere"], "nowhere does not exist"),
    ],
)
def test_bad_arguments_give_one_line(shell, run, tasks, words, expected):
    arguments = [str(tasks / word) if word[0] != "-" and word != "64" else word for word in words]
    assert expected in shell("eval", run, "--tasks", "arc_agi", *arguments, code=2)


def test_a_dry_run_checks_a_recipe_of_real_tasks(shell, tasks):
    section = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["data"]
    assert section["kind"] == "arc"
    output = shell(
        *("train", RECIPE, "--dry-run", "--name", "real", *SHORT[:3], *SHORT[5:]),
        *(f"data={{kind: arc, path: {tasks / 'tasks'}, solutions: {tasks / 'solutions.json'}}}",),
    )
    assert "dry run" in output

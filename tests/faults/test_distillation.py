"""T2 and T3 for distillation; teachers with another vocabulary are refused."""

import pytest

KINDS = ("kd", "on_policy_kd")
STEPS = 6


@pytest.fixture(scope="module")
def teacher(shared_workspace, recipe) -> dict:
    """The recipe of a dense teacher, wider than the students, that has been trained."""
    data = recipe | {
        "model": {**recipe["model"], "dim": 48, "pattern": recipe["model"]["pattern"][:1]},
        "train": {**recipe["train"], "steps": 3},
        "objective": {"kind": "sft"},
    }
    code, output = shared_workspace.train(data, "teacher")
    assert code == 0, output
    return data


@pytest.fixture(scope="module")
def students(shared_workspace, recipe, teacher) -> dict[str, dict]:
    """Recipes with dropout: `kd`, `on_policy_kd` with half of the completions from the student, and
    `experts`, which distils a transplant of the teacher with frozen attention.
    """
    folder = str(shared_workspace.runs / "teacher")
    objectives = {
        "kd": {
            "temperature": 2,
            "ce_weight": 0.3,
            "weights": {"think": 5},
            "teacher_weights": "int8",
        },
        "on_policy_kd": {
            **{
                "max_new_tokens": 6,
                "privileged_prompt": "It is {answer}.",
                "on_policy_fraction": {"begin": 0.5, "end": 0.5},
            },
            **{"generation_batch_size": 3},
        },
    }
    own = {
        "tokenizer": {"path": f"{folder}/final"},
        "train": {**recipe["train"], "steps": STEPS, "save_every": 2, "eval_every": 3},
        "log": {"every": 1},
    }
    recipes = {
        kind: recipe | own | {"objective": {"kind": kind, "teacher": folder} | keys}
        for kind, keys in objectives.items()
    }
    sparse = str(shared_workspace.folder / "sparse")
    words = ("experts=4", "hidden_dim=16", "router_grad=smk", "reset_interval=2")
    code, output = shared_workspace.call("transplant", folder, sparse, *words)
    assert code == 0, output
    experts = recipes["kd"] | {"init_from": sparse}
    del experts["model"], experts["tokenizer"]
    return recipes | {"experts": experts}


@pytest.fixture(scope="module")
def uninterrupted(shared_workspace, students) -> dict[str, tuple[dict[str, object], list[str]]]:
    """Results of uninterrupted runs, and their kill points in order."""
    return {kind: shared_workspace.whole(data, f"{kind}-whole") for kind, data in students.items()}


@pytest.mark.parametrize(
    ("kind", "name", "index"),
    [
        ("kd", "micro-step", 7),
        pytest.param("kd", "manifest", 1, marks=pytest.mark.slow),
        ("experts", "micro-step", 7),
        pytest.param("experts", "manifest", 1, marks=pytest.mark.slow),
        ("on_policy_kd", "rollout", -3),
        pytest.param("on_policy_kd", "micro-step", 9, marks=pytest.mark.slow),
        pytest.param("on_policy_kd", "manifest", 1, marks=pytest.mark.slow),
    ],
)
def test_T2_distillation_killed_and_resumed_ends_in_the_same_bits(
    kind, name, index, shared_workspace, students, uninterrupted
):
    expected, events = uninterrupted[kind]
    event = shared_workspace.points(events, name)[index]
    assert shared_workspace.killed(students[kind], f"{kind}-{name}", event) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_T3_two_ranks_have_the_losses_and_gradient_norms_of_one_process(
    kind, shared_workspace, students, deterministic_model
):
    """With AdamW, as in test_ranks.py."""
    data = students[kind]
    data = data | {
        "model": deterministic_model,
        "optim": {"matrices": {"kind": "adamw", "lr": 1.0e-3}},
    }
    code, output = shared_workspace.train(data, f"{kind}-one")
    assert code == 0, output
    code, output = shared_workspace.train_pair(data, f"{kind}-two", "ddp")
    assert code == 0, output
    one, two = (
        [
            record
            for record in shared_workspace.metrics(f"{kind}-{name}")
            if record["kind"] == "train"
        ]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == STEPS
    for single, pair in zip(one, two, strict=True):
        for name in ("loss", "nll", "grad_norm"):
            assert pair[name] == pytest.approx(single[name], rel=1e-4), (name, single["step"])


def test_a_teacher_of_another_vocabulary_is_refused_in_one_line(shared_workspace, recipe, teacher):
    data = recipe | {"tokenizer": {"train": {"vocab_size": 310}}}
    data |= {"objective": {"kind": "kd", "teacher": str(shared_workspace.runs / "teacher")}}
    code, output = shared_workspace.train(data, "foreign")
    assert code == 2, output
    last = output.strip().splitlines()[-1]
    assert "objective.teacher:" in last
    assert "gives other ids than this run's" in last
    assert "Traceback" not in output


def test_a_teacher_with_a_head_of_another_size_is_refused_in_one_line(
    shared_workspace, students, recipe
):
    data = students["kd"]
    code, output = shared_workspace.train(
        data | {"model": {**data["model"], "vocab_size": 384}}, "padded"
    )
    assert code == 2, output
    last = output.strip().splitlines()[-1]
    assert "its head has 320 ids and that of this run's model 384" in last
    assert "Traceback" not in output


def test_a_missing_teacher_is_refused_in_one_line(shared_workspace, students):
    data = students["on_policy_kd"]
    objective = {**data["objective"], "teacher": "/nowhere/at/all"}
    code, output = shared_workspace.train(data | {"objective": objective}, "alone")
    assert code == 2, output
    assert "/nowhere/at/all: no such folder" in output.strip().splitlines()[-1]
    assert "Traceback" not in output

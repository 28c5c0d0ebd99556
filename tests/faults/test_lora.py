"""T2 for LoRA: a run with adapters and dropout, killed and resumed, ends in the same bits."""

import pytest


@pytest.fixture(scope="module")
def lora_recipe(shared_workspace, recipe) -> dict:
    """The recipe of a LoRA run with dropout in the adapters and in the model."""
    base = recipe | {"train": {**recipe["train"], "steps": 2}}
    code, output = shared_workspace.train(base, "lora-base")
    assert code == 0, output
    own = {key: value for key, value in recipe.items() if key not in ("model", "tokenizer")}
    train = {**recipe["train"], "steps": 6, "save_every": 2, "eval_every": 3, "sample_every": 3}
    section = {"targets": "all", "rank": 2, "alpha": 4, "dropout": 0.2}
    start = str(shared_workspace.runs / "lora-base")
    return own | {"train": train, "init_from": start, "lora": section}


@pytest.fixture(scope="module")
def whole(shared_workspace, lora_recipe) -> tuple[dict[str, object], list[str]]:
    """Result of an uninterrupted run, and its kill points in order."""
    return shared_workspace.whole(lora_recipe, "lora-whole")


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("micro-step", 7),
        pytest.param("manifest", 1, marks=pytest.mark.slow),
        pytest.param("in sample", 0, marks=pytest.mark.slow),
    ],
)
def test_T2_adapters_killed_and_resumed_end_in_the_same_bits(
    name, index, shared_workspace, lora_recipe, whole
):
    expected, events = whole
    run = f"lora-{name.replace(' ', '-')}"
    assert (
        shared_workspace.killed(lora_recipe, run, shared_workspace.points(events, name)[index])
        == expected
    )


def test_a_resumed_run_must_train_the_same_adapters(shared_workspace, lora_recipe, whole):
    data = lora_recipe | {"lora": {**lora_recipe["lora"], "rank": 3}}
    code, output = shared_workspace.train(data, "lora-whole", "--resume")
    assert code == 2, output
    assert "was begun with lora.rank: 2, not 3" in output

"""T2 for LoRA: killed and resumed with dropout, a run of adapters ends in the same bits."""

import pytest


@pytest.fixture(scope="module")
def adapting(shared_place, recipe) -> dict:
    """A run that trains adapters, with dropout of their own beside the model's."""
    base = recipe | {"train": {**recipe["train"], "steps": 2}}
    code, output = shared_place.train(base, "lora-base")
    assert code == 0, output
    own = {key: value for key, value in recipe.items() if key not in ("model", "tokenizer")}
    train = {**recipe["train"], "steps": 6, "save_every": 2, "eval_every": 3, "sample_every": 3}
    section = {"targets": "all", "rank": 2, "alpha": 4, "dropout": 0.2}
    start = str(shared_place.runs / "lora-base")
    return own | {"train": train, "init_from": start, "lora": section}


@pytest.fixture(scope="module")
def whole(shared_place, adapting) -> tuple[dict[str, object], list[str]]:
    """What the run leaves that nothing happened to, and its events in order."""
    return shared_place.whole(adapting, "lora-whole")


@pytest.mark.parametrize(
    ("name", "which"),
    [
        ("micro-step", 7),
        pytest.param("manifest", 1, marks=pytest.mark.slow),
        pytest.param("in sample", 0, marks=pytest.mark.slow),
    ],
)
def test_T2_adapters_killed_and_resumed_end_in_the_same_bits(
    name, which, shared_place, adapting, whole
):
    left, events = whole
    run = f"lora-{name.replace(' ', '-')}"
    assert shared_place.killed(adapting, run, shared_place.points(events, name)[which]) == left


def test_a_resumed_run_must_train_the_same_adapters(shared_place, adapting, whole):
    data = adapting | {"lora": {**adapting["lora"], "rank": 3}}
    code, output = shared_place.train(data, "lora-whole", "--resume")
    assert code == 2, output
    assert "was begun with lora.rank: 2, not 3" in output

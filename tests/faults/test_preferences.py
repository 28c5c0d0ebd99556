"""T1 and T3 for DPO, reward models and EAVI: killed and resumed runs, and two ranks."""

import pytest
from safetensors.torch import load_file

OBJECTIVES = {
    "dpo": {"kind": "dpo", "beta": 0.5},
    "kto": {"kind": "dpo", "loss": "kto", "beta": 0.5},
    "reward": {"kind": "reward"},
    "eavi": {"kind": "eavi"},
    "eavi-hard": {"kind": "eavi", "excursion": "hard", "alignment_weight": 0.8},
}


def recipe_of(recipe: dict, objective: str, **train: object) -> dict:
    """Return the recipe with an objective and sequences long enough for whole pairs or chats."""
    settings = {**recipe["train"], "seq_len": 160, "batch_size": 2, "steps": 6, **train}
    data = {"kind": "tasks", "tasks": ["copy"], "count": 200, "length": 3}
    return recipe | {"objective": OBJECTIVES[objective], "data": data, "train": settings}


@pytest.mark.parametrize(
    ("objective", "fraction"),
    [
        ("dpo", 0.4),
        ("eavi", 0.7),
        pytest.param("reward", 0.6, marks=pytest.mark.slow),
        pytest.param("eavi-hard", 0.5, marks=pytest.mark.slow),
    ],
)
def test_T1_a_killed_and_resumed_run_ends_in_the_same_bits(
    objective, fraction, shared_workspace, recipe
):
    data = recipe_of(recipe, objective, save_every=2)
    expected, events = shared_workspace.whole(data, f"whole-{objective}")
    point = int(fraction * len(events))
    assert "manifest" in events[: point - 1], "there is a checkpoint to resume from"
    found = shared_workspace.killed(data, f"killed-{objective}", point)
    for key, value in expected.items():
        assert found[key] == value, key


@pytest.mark.parametrize(
    "objective",
    [
        *("dpo", "eavi"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("kto", "reward", "eavi-hard")),
    ],
)
def test_T3_two_ranks_give_the_gradients_of_one_process(
    objective, shared_workspace, recipe, deterministic_model
):
    """AdamW with an `eps` far above all second moments is nearly gradient descent, so weights
    differ as much as gradients: only by the order of float32 sums.
    """
    plain = recipe | {"model": deterministic_model, "log": {"every": 1}}
    adam = {"kind": "adamw", "lr": 1.0e-2, "eps": 1.0, "weight_decay": 0.0}
    optim = {"matrices": adam, "others": adam, "max_grad_norm": None}
    data = recipe_of(plain, objective, batch_size=4, grad_accum_steps=1, steps=4, save_every=4)
    data |= {"optim": optim}
    code, output = shared_workspace.train(data, f"one-{objective}")
    assert code == 0, output
    code, output = shared_workspace.train_pair(data, f"two-{objective}", "ddp")
    assert code == 0, output
    runs = [shared_workspace.runs / f"{count}-{objective}" for count in ("one", "two")]
    checkpoints = [run / "checkpoints" / "step-00000004" for run in runs]
    files = [
        {path.name for path in checkpoint.glob("*.safetensors") if "rng" not in path.name}
        for checkpoint in checkpoints
    ]
    assert files[0] == files[1]
    for file in files[0] - {"optim.safetensors"}:
        one, two = (load_file(checkpoint / file) for checkpoint in checkpoints)
        for name in one:
            assert float((one[name] - two[name]).abs().max()) < 1e-6, name
    losses = [
        [
            record["loss"]
            for record in shared_workspace.metrics(run.name)
            if record["kind"] == "train"
        ]
        for run in runs
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)  # sums of some 60 logs in float32
    assert losses[0][-1] < losses[0][0]

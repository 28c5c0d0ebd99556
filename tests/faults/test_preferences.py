"""T1 to T4 for objectives on pairs, and on whole chats: killed, resumed, and spread over two
processes.
"""

import pytest
from safetensors.torch import load_file

OBJECTIVES = {
    "dpo": {"kind": "dpo", "beta": 0.5},
    "kto": {"kind": "dpo", "loss": "kto", "beta": 0.5},
    "reward": {"kind": "reward"},
    "eavi": {"kind": "eavi"},
    "eavi-hard": {"kind": "eavi", "excursion": "hard", "alignment_weight": 0.8},
}


def of_pairs(recipe: dict, objective: str, **train: object) -> dict:
    """The tiny recipe on generated pairs or answers, long enough for whole ones."""
    settings = {**recipe["train"], "seq_len": 160, "batch_size": 2, "steps": 6, **train}
    data = {"kind": "tasks", "tasks": ["copy"], "count": 200, "length": 3}
    return recipe | {"objective": OBJECTIVES[objective], "data": data, "train": settings}


@pytest.mark.parametrize(
    ("objective", "part"),
    [
        ("dpo", 0.4),
        ("eavi", 0.7),
        pytest.param("reward", 0.6, marks=pytest.mark.slow),
        pytest.param("eavi-hard", 0.5, marks=pytest.mark.slow),
    ],
)
def test_T1_a_killed_run_on_pairs_ends_in_the_same_bits(objective, part, shared_place, recipe):
    data = of_pairs(recipe, objective, save_every=2)
    left, events = shared_place.whole(data, f"whole-{objective}")
    point = int(part * len(events))
    assert "manifest" in events[: point - 1], "there is something to go on from"
    found = shared_place.killed(data, f"killed-{objective}", point)
    for key, value in left.items():
        assert found[key] == value, key


@pytest.mark.parametrize(
    "objective",
    [
        *("dpo", "eavi"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("kto", "reward", "eavi-hard")),
    ],
)
def test_T3_two_ranks_give_the_gradients_of_one_process(
    objective, shared_place, recipe, steady_model
):
    """Nearly plain gradient descent (`eps` outweighs all second moments), so that weights differ by
    what gradients differ: not at all, but for the order of float32 sums.
    """
    plain = recipe | {"model": steady_model, "log": {"every": 1}}
    adam = {"kind": "adamw", "lr": 1.0e-2, "eps": 1.0, "weight_decay": 0.0}
    optim = {"matrices": adam, "others": adam, "max_grad_norm": None}
    data = of_pairs(plain, objective, batch_size=4, grad_accum_steps=1, steps=4, save_every=4)
    data |= {"optim": optim}
    code, output = shared_place.train(data, f"one-{objective}")
    assert code == 0, output
    code, output = shared_place.train_pair(data, f"two-{objective}", "ddp")
    assert code == 0, output
    runs = [shared_place.runs / f"{count}-{objective}" for count in ("one", "two")]
    ends = [run / "checkpoints" / "step-00000004" for run in runs]
    files = [
        {path.name for path in end.glob("*.safetensors") if "rng" not in path.name} for end in ends
    ]
    assert files[0] == files[1]
    for file in files[0] - {"optim.safetensors"}:
        one, two = (load_file(end / file) for end in ends)
        for name in one:
            assert float((one[name] - two[name]).abs().max()) < 1e-6, name
    losses = [
        [row["loss"] for row in shared_place.metrics(run.name) if row["kind"] == "train"]
        for run in runs
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)  # sums of some 60 logs in float32
    assert losses[0][-1] < losses[0][0]

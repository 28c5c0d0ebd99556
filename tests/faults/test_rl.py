"""T2 and T7 for GRPO, PPO and SPO: a run stopped anywhere, in the middle of rollouts too, and
resumed ends in the same bits.
"""

import random
import signal
from functools import cache

import pytest

OBJECTIVES = {
    "grpo": {"kind": "grpo", "num_generations": 3, "kl_coef": 0.1},
    "ppo": {"kind": "ppo", "kl_coef": 0.1, "target_kl": 0.05},
    "spo": {"kind": "spo", "warmup_samples": 2},
}
COMMON = {
    "rewards": [{"kind": "length", "low": 20, "high": 40}],
    "max_new_tokens": 6,
    "num_minibatches": 2,
    "num_epochs": 2,
}


def recipe_of(kind: str, recipe: dict) -> dict:
    """Return a recipe with saves in the middle of rollouts and 12 prompts, which SPO sees again."""
    train = {
        "steps": 10,
        "batch_size": 4,
        "grad_accum_steps": 1,
        "seq_len": 64,
        "precision": "fp32",
    }
    train |= {"save_every": 3, "eval_every": 4, "sample_every": 5, "keep": recipe["train"]["keep"]}
    data = {"kind": "tasks", "tasks": ["arithmetic"], "count": 14, "digits": 1, "validation": 0.15}
    return recipe | {
        "data": data,
        "train": train,
        "objective": OBJECTIVES[kind] | COMMON,
        "eval": {"max_samples": 2, "max_new_tokens": 4},
        "log": {"every": 1},
    }


@pytest.fixture(scope="module")
def whole(shared_workspace, recipe):
    """`whole(kind)` returns recipe, kill points and result of an uninterrupted run; runs once."""

    @cache
    def run(kind: str) -> tuple[dict, list[str], dict]:
        data = recipe_of(kind, recipe)
        result, events = shared_workspace.whole(data, kind)
        return data, events, result

    return run


def points(events: list[str]) -> list[int]:
    """Return indices from 1 of two points in rollouts and one in a step, after the first save."""
    generator = random.Random(3)
    first = events.index("manifest")
    rollouts = [n for n, name in enumerate(events, 1) if name == "rollout" and n > first]
    steps = [n for n, name in enumerate(events, 1) if name == "step" and n > first]
    return [*generator.sample(rollouts, 2), generator.choice(steps)]


CASES = [
    pytest.param(kind, index, by, marks=[] if (kind, index) in FAST else pytest.mark.slow)
    for FAST in [{("grpo", 0), ("spo", 1)}]
    for kind in OBJECTIVES
    for index, by in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL))
]


@pytest.mark.parametrize(("kind", "index", "by"), CASES)
def test_T2_a_run_stopped_in_a_rollout_and_resumed_ends_in_the_same_bits(
    kind, index, by, shared_workspace, whole
):
    data, events, expected = whole(kind)
    point = points(events)[index]
    name = f"{kind}-{index}"
    code, output = shared_workspace.train(
        data, name, TINSMITH_KILL_AT=str(point), TINSMITH_KILL_BY=by.name
    )
    assert code == (75 if by == signal.SIGTERM else -by), output
    code, output = shared_workspace.train(data, name, "--resume")
    assert code == 0, output
    found = shared_workspace.result(name)
    for key in ("model.safetensors", "optim.safetensors", "rng-00000.safetensors", "final"):
        assert found[key] == expected[key], (key, events[point - 1])
    assert found["metrics"] == expected["metrics"]


def test_the_reference_run_changes_weights_by_rewards(whole):
    """Rewards differ and weights change; without that the tests above would be empty."""
    _, events, expected = whole("grpo")
    assert events.count("rollout") > 20
    steps = [record for record in expected["metrics"] if record["kind"] == "train"]
    assert sum(record["approx_kl"] > 1e-6 for record in steps) >= 3
    assert any(record["reward_std"] > 0 for record in steps)
    assert [record["step"] for record in expected["metrics"] if record["kind"] == "eval"] == [
        4,
        8,
        10,
    ]

"""T2 and T7 for objectives that answer their own prompts: stopped anywhere, in the middle of
rollouts too, a run ends in the same bits.
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
    """Steps in the middle of rollouts; 12 prompts, so that SPO meets them again."""
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
def whole(shared_place, recipe):
    """(kind) -> recipe, events and results of a run that nothing happens to; each is run once."""

    @cache
    def made(kind: str) -> tuple[dict, list[str], dict]:
        data = recipe_of(kind, recipe)
        left, events = shared_place.whole(data, kind)
        return data, events, left

    return made


def points(events: list[str]) -> list[int]:
    """Two places in rollouts and one between steps, numbered from 1, none before the first save."""
    numbers = random.Random(3)
    first = events.index("manifest")
    rollouts = [n for n, name in enumerate(events, 1) if name == "rollout" and n > first]
    steps = [n for n, name in enumerate(events, 1) if name == "step" and n > first]
    return [*numbers.sample(rollouts, 2), numbers.choice(steps)]


CASES = [
    pytest.param(kind, number, by, marks=[] if (kind, number) in FAST else pytest.mark.slow)
    for FAST in [{("grpo", 0), ("spo", 1)}]
    for kind in OBJECTIVES
    for number, by in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL))
]


@pytest.mark.parametrize(("kind", "number", "by"), CASES)
def test_T2_stopped_in_a_rollout_a_run_ends_in_the_same_bits(kind, number, by, shared_place, whole):
    data, events, expected = whole(kind)
    point = points(events)[number]
    name = f"{kind}-{number}"
    code, output = shared_place.train(
        data, name, TINSMITH_KILL_AT=str(point), TINSMITH_KILL_BY=by.name
    )
    assert code == (75 if by == signal.SIGTERM else -by), output
    code, output = shared_place.train(data, name, "--resume")
    assert code == 0, output
    found = shared_place.result(name)
    for key in ("model.safetensors", "optim.safetensors", "rng-00000.safetensors", "final"):
        assert found[key] == expected[key], (key, events[point - 1])
    assert found["metrics"] == expected["metrics"]


def test_runs_learn_from_their_answers(whole):
    """Otherwise nothing is tested above: rewards differ and weights move."""
    _, events, expected = whole("grpo")
    assert events.count("rollout") > 20
    steps = [row for row in expected["metrics"] if row["kind"] == "train"]
    assert sum(row["approx_kl"] > 1e-6 for row in steps) >= 3
    assert any(row["reward_std"] > 0 for row in steps)
    assert [row["step"] for row in expected["metrics"] if row["kind"] == "eval"] == [4, 8, 10]

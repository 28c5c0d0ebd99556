"""The runs that are compared: recipes of recipes/tiny with the same sums, the same number of
answers to a rollout, and one model to begin with.
"""

import random
from pathlib import Path
from typing import Any

from tinsmith.core.parse import read_yaml
from tinsmith.data import tasks

Section = dict[str, Any]

RECIPES = Path(__file__).parents[2] / "recipes" / "tiny"
ANSWERS = 256
"""Of a rollout; 128 pairs have as many."""
HELD_BACK = 200
"""Sums that no run is trained on."""
ROOM = 64
"""Positions of a question with its answer."""
PACKED = 128
"""Positions of a row of chats."""
ROLLOUTS = 150

CASES: dict[str, tuple[str, Section]] = {
    "sft": ("sums", {}),
    "dpo": ("dpo", {}),
    "ppo": ("ppo", {"max_moved": None}),
    "grpo": ("grpo", {}),
    "dapo": ("grpo", {"loss": "dapo"}),
    "dr_grpo": ("grpo", {"loss": "dr_grpo"}),
    "cispo": ("grpo", {"loss": "cispo"}),
    "spo": ("spo", {"first_answers": 0}),
}
"""Name -> the recipe, and what of its objective is changed: nothing that stops a rollout early or
draws answers beside it, for these would not be equal tokens.
"""
OFFLINE = ("sft", "dpo")
"""Those that learn from answers of the data; the others generate theirs."""


def sums() -> tuple[list[Section], list[Section]]:
    """Sums of one digit, all different, as rows that can be read as chats, pairs and prompts:
    those to learn from, and those that are held back.
    """
    found: dict[str, Section] = {}
    for index in range(20_000):
        task = tasks.generate("arithmetic", 0, index, digits=1)
        row = task.chat(thoughts=False) | task.pair(thoughts=False) | task.prompt()
        found[task.question] = row
    rows = [found[question] for question in sorted(found)]
    random.Random(0).shuffle(rows)
    return rows[HELD_BACK:], rows[:HELD_BACK]


def start(data: Section, seed: int) -> Section:
    """The model that all begin with: SFT, stopped where it knows about half of the sums."""
    base = read_yaml(RECIPES / "sums.yaml")
    return base | {"data": data, "train": base["train"] | _quiet(base["train"]["steps"], seed)}


def recipe(case: str, begun: Path, data: Section, seed: int, rollouts: int) -> Section:
    """The run of a case from the model in `begun`, with five checkpoints on its way."""
    name, changed = CASES[case]
    base = read_yaml(RECIPES / f"{name}.yaml")
    objective = base["objective"] | changed
    steps = rollouts * objective.get("updates", 1)
    train = base["train"] | {"save_every": max(1, steps // 5)} | _quiet(steps, seed)
    train |= {"sft": {"rows": 57}, "dpo": {"rows": ANSWERS // 2, "context": ROOM}}.get(case, {})
    if case == "sft":  # its own optimizer is for a model that knows nothing
        base["optim"] = read_yaml(RECIPES / "grpo.yaml")["optim"]
    return {
        **{"init_from": str(begun), "data": data, "objective": objective},
        **{"optim": base["optim"], "train": train, "log": {"every": 1}},
    }


def passes(case: str) -> int:
    """How often a case reads a rollout."""
    return read_yaml(RECIPES / f"{CASES[case][0]}.yaml")["objective"].get("updates", 1)


def _quiet(steps: int, seed: int) -> Section:
    """So many steps, and no look at anything on the way."""
    never = {"eval_every": 10_000, "sample_every": 10_000}
    return {"steps": steps, "seed": seed, "keep": {"last": 6, "best": False}} | never

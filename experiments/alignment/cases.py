"""The runs that are compared: recipes of recipes/tiny with the same sums, the same number of
answers to a rollout, and one model to begin with.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tinsmith.core.parse import read_yaml
from tinsmith.data.sources import tasks

Section = dict[str, Any]

RECIPES = Path(__file__).parents[2] / "recipes" / "tiny"
ANSWERS = 256
"""Of a rollout; 128 pairs have as many."""
HELD_BACK = 100
"""Sums that no run is trained on."""
ROOM = 64
"""Positions of a question with its answer."""
OFFLINE = {"sft": {"rows": 57}, "dpo": {"rows": ANSWERS // 2, "context": ROOM}}
"""Those that learn from answers of the data, with rows of a step that hold about as many of them as
a rollout: of packed chats, and pairs. The others generate theirs."""
START = 150
"""Steps of the model that all begin with."""
RIGHT = 0.45
"""The share of right answers among those that it is taught."""
ROLLOUTS = 40
LOOKS = 8

CASES: dict[str, tuple[str, Section]] = {
    "sft": ("sums", {}),
    "dpo": ("dpo", {}),
    "ppo": ("ppo", {"target_kl": None}),
    "grpo": ("grpo", {}),
    "dapo": ("grpo", {"loss": {"kind": "dapo"}}),
    "dr_grpo": ("grpo", {"loss": {"kind": "dr_grpo"}}),
    "cispo": ("grpo", {"loss": {"kind": "cispo"}}),
    "spo": ("spo", {"warmup_samples": 0}),
}
"""Name -> the recipe, and what of its objective is changed: nothing that stops a rollout early or
draws answers beside it, for these would not be equal tokens.
"""


class Sums(NamedTuple):
    """Rows that can be read as chats, as pairs, and as prompts."""

    taught: list[Section]
    """What the start is made of: of each sum some right answers, others one too high."""
    learned: list[Section]
    """The same sums once, with the right answer; of a pair the rejected one is one too high."""
    held_back: list[Section]


def sums() -> Sums:
    """Additions of one digit in four forms, all there are."""
    every = {task.question: task for task in _generated() if "+" in task.question}
    rows = [_row(every[question]) for question in sorted(every)]
    numbers = random.Random(0)
    numbers.shuffle(rows)
    learned = rows[HELD_BACK:]
    taught = [_output(row, numbers.random() < RIGHT) for row in learned for _ in range(10)]
    return Sums(taught, learned, rows[:HELD_BACK])


def _generated() -> Iterator[tasks.GeneratedTask]:
    return (tasks.generate_task("arithmetic", 0, index, digits=1) for index in range(20_000))


def _row(task: tasks.GeneratedTask) -> Section:
    near = {"role": "assistant", "content": str(int(task.answer) + 1)}
    pair = task.pair(reasoning=False) | {"rejected": near}
    return task.chat(reasoning=False) | pair | task.prompt()


def _output(row: Section, right: bool) -> Section:
    return {"messages": [row["messages"][0], row["chosen" if right else "rejected"]]}


def start(data: Section, seed: int) -> Section:
    """The model that all begin with: it knows the sums, and does not know which answer to say."""
    base = read_yaml(RECIPES / "sums.yaml")
    return base | {"data": data, "train": base["train"] | _quiet(START, seed)}


def recipe(case: str, begun: Path, data: Section, seed: int, rollouts: int) -> Section:
    """The run of a case from the model in `begun`, with `LOOKS` checkpoints on its way."""
    name, changed = CASES[case]
    base = read_yaml(RECIPES / f"{name}.yaml")
    objective = base["objective"] | changed | ({} if case in OFFLINE else {"seed": seed})
    steps = rollouts * objective.get("updates", 1)
    train = base["train"] | {"save_every": max(1, steps // LOOKS)} | _quiet(steps, seed)
    train |= OFFLINE.get(case, {})
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
    return {"steps": steps, "seed": seed, "keep": {"last": LOOKS + 1, "best": False}} | never

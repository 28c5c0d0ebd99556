"""The runs that are compared: recipes of recipes/tiny on the same sums, with the same number of
completions in a rollout and the same initial model.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tinsmith.core.yamlfile import read_yaml
from tinsmith.data.sources import tasks

Section = dict[str, Any]

RECIPES = Path(__file__).parents[2] / "recipes" / "tiny"
COMPLETIONS = 256
"""Completions of a rollout; 128 pairs contain as many."""
HELD_OUT = 100
"""Number of held-out sums, on which no run is trained."""
SEQ_LEN = 64
"""Tokens of a question with its answer."""
OFFLINE = {
    "sft": {"batch_size": 57},
    "dpo": {"batch_size": COMPLETIONS // 2, "seq_len": SEQ_LEN},
}
"""Cases that train on completions of the data set -> `train` keys with which a batch of packed
chats or of pairs contains about as many completions as a rollout. Other cases generate them.
"""
SFT_STEPS = 150
"""Steps of the SFT model that all cases start from."""
RIGHT_SHARE = 0.45
"""Share of right answers in the SFT data."""
ROLLOUTS = 40
CHECKPOINTS = 8

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
"""Name -> (recipe, changed keys of its objective). Early stopping and additional completions are
off, so that all cases train on equal numbers of tokens.
"""


class Sums(NamedTuple):
    """Samples that can be read as chats, as pairs and as prompts."""

    sft: list[Section]
    """Data of the SFT model: each sum with right answers and with answers one too high."""
    train: list[Section]
    """The same sums once, with the right answer; the rejected completion is one too high."""
    held_out: list[Section]


def sums() -> Sums:
    """Return all additions of one digit, in four wordings."""
    by_question = {task.question: task for task in _generated() if "+" in task.question}
    samples = [_sample(by_question[question]) for question in sorted(by_question)]
    generator = random.Random(0)
    generator.shuffle(samples)
    train = samples[HELD_OUT:]
    sft = [_chat(each, generator.random() < RIGHT_SHARE) for each in train for _ in range(10)]
    return Sums(sft, train, samples[:HELD_OUT])


def _generated() -> Iterator[tasks.GeneratedTask]:
    return (tasks.generate_task("arithmetic", 0, index, digits=1) for index in range(20_000))


def _sample(task: tasks.GeneratedTask) -> Section:
    wrong = {"role": "assistant", "content": str(int(task.answer) + 1)}
    pair = task.pair(reasoning=False) | {"rejected": wrong}
    return task.chat(reasoning=False) | pair | task.prompt()


def _chat(sample: Section, right: bool) -> Section:
    return {"messages": [sample["messages"][0], sample["chosen" if right else "rejected"]]}


def sft_recipe(data: Section, seed: int) -> Section:
    """Return the recipe of the SFT model, which all cases start from."""
    base = read_yaml(RECIPES / "sums.yaml")
    return base | {"data": data, "train": base["train"] | _steps_only(SFT_STEPS, seed)}


def recipe(case: str, sft_run: Path, data: Section, seed: int, rollouts: int) -> Section:
    """Return the recipe of a case from the model in `sft_run`, with `CHECKPOINTS` checkpoints."""
    name, changed = CASES[case]
    base = read_yaml(RECIPES / f"{name}.yaml")
    objective = base["objective"] | changed | ({} if case in OFFLINE else {"seed": seed})
    steps = rollouts * objective.get("num_epochs", 1)
    train = base["train"] | {"save_every": max(1, steps // CHECKPOINTS)} | _steps_only(steps, seed)
    train |= OFFLINE.get(case, {})
    if case == "sft":  # the recipe's own optimizer is for an untrained model
        base["optim"] = read_yaml(RECIPES / "grpo.yaml")["optim"]
    return {
        **{"init_from": str(sft_run), "data": data, "objective": objective},
        **{"optim": base["optim"], "train": train, "log": {"every": 1}},
    }


def passes(case: str) -> int:
    """Return the number of passes of a case over a rollout."""
    return read_yaml(RECIPES / f"{CASES[case][0]}.yaml")["objective"].get("num_epochs", 1)


def _steps_only(steps: int, seed: int) -> Section:
    """Return `train` keys with so many steps and without evaluation and samples in between."""
    never = {"eval_every": 10_000, "sample_every": 10_000}
    return {"steps": steps, "seed": seed, "keep": {"last": CHECKPOINTS + 1, "best": False}} | never

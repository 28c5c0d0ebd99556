"""Rewards as plain functions of a prompt and what was said to it."""

import re
from collections.abc import Callable

from tinsmith.data.prompts import Prompt

Reward = Callable[[Prompt, str], float]


def exact(prompt: Prompt, said: str) -> float:
    """1 where the last number of the answer is the right one."""
    found = re.findall(r"-?\d+", said.rpartition("</think>")[2])
    return float(bool(found) and found[-1] == prompt.answer)


def length(prompt: Prompt, said: str) -> float:
    """Characters over 100, at most 1."""
    return min(len(said) / 100, 1.0)


REWARDS: dict[str, Reward] = {"exact": exact, "length": length}

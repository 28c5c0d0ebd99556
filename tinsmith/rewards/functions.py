"""What an answer is worth: plain functions of a prompt and an answer's text.

Every one here but a classifier's is from 0 to 1. `judge` adds several up by weight, and bears with
those that fail: a reward that raises, exits or is not a finite number counts as its `lowest` and is
reported with its row.
"""

import math
import re
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from tinsmith.core.sandbox import SandboxLimits, run_python
from tinsmith.data.formats.prompts import Prompt
from tinsmith.data.sources.tasks import GeneratedTask, check_answer, extract_final_answer

RewardFunc = Callable[[Prompt, str], float]
"""A prompt, and the text of one answer to it (without its end of turn), to a number."""


class Response(NamedTuple):
    """What is judged."""

    prompt: Prompt
    text: str
    """What was said last, without its end."""
    ids: Sequence[int] = ()
    """The prompt and all that followed."""


BatchReward = Callable[[Sequence[Response]], Sequence[float | BaseException]]
"""Judges many answers (N,) at once: numbers (N,), or why there is none."""

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_CODE = re.compile(r"```(?:[Pp]ython|py)?[ \t]*\n(.*?)```", re.DOTALL)
UNIT_TEST_LIMITS = SandboxLimits()
"""Of programs that are tested."""


class WeightedReward(NamedTuple):
    """One reward of several."""

    name: str
    reward: BatchReward
    weight: float = 1.0
    fallback: float = 0.0
    """What it counts as where it fails."""


class RewardFailure(NamedTuple):
    """A reward that could not be had."""

    response_index: int
    """The answer's, among those that were judged."""
    prompt_id: int
    """The prompt's number in its source."""
    reward_name: str
    reason: str


class ScoredResponses(NamedTuple):
    """N answers, judged."""

    rewards: list[float]
    """(N,): weighted sums, all finite."""
    per_reward: dict[str, list[float]]
    """By rule, (N,), not weighted."""
    failures: list[RewardFailure]


def score_responses(
    weighted_rewards: Sequence[WeightedReward], responses: Sequence[Response]
) -> ScoredResponses:
    """Judge N answers by every rule."""
    failures: list[RewardFailure] = []
    parts = {rule.name: _bear(rule, responses, failures) for rule in weighted_rewards}
    rewards = [
        math.fsum(rule.weight * parts[rule.name][place] for rule in weighted_rewards)
        for place in range(len(responses))
    ]
    return ScoredResponses(rewards, parts, failures)


def as_batch_reward(reward: RewardFunc) -> BatchReward:
    """Judges one answer after the other; one that makes `reward` raise harms no other."""
    return lambda answers: [_tried(reward, answer) for answer in answers]


def _tried(reward: RewardFunc, answer: Response) -> float | BaseException:
    try:
        return float(reward(answer.prompt, answer.text))
    except (Exception, SystemExit) as error:  # it is somebody's code: training goes on
        return error


def _bear(
    rule: WeightedReward, answers: Sequence[Response], failures: list[RewardFailure]
) -> list[float]:
    try:
        found = rule.reward(answers)
        if len(found) != len(answers):
            raise ValueError(f"{len(found)} rewards for {len(answers)} answers")
    except (Exception, SystemExit) as error:  # as above
        found = [error] * len(answers)
    kept: list[float] = []
    for place, value in enumerate(found):
        if isinstance(value, float | int) and math.isfinite(value):
            kept.append(float(value))
        else:
            kept.append(rule.fallback)
            number = answers[place].prompt.prompt_id
            failures.append(RewardFailure(place, number, rule.name, _reason(value)))
    return kept


def _reason(value: float | BaseException) -> str:
    failed = isinstance(value, BaseException)
    return f"{type(value).__name__}: {value}" if failed else f"gave {value}"


def exact_match(prompt: Prompt, text: str) -> float:
    """1 where the answer is right, else 0.

    A generated task is checked by its own rule. Otherwise what counts is what follows `</think>`,
    there the last `<answer>` span: of a numeric answer its last number, compared as a number; of
    any other all of it, blanks and case aside. ValueError where the prompt has no answer.
    """
    if prompt.answer is None:
        raise ValueError("the row has no answer to compare with")
    kind = prompt.record.get("task")
    if kind in ("arithmetic", "sort", "copy"):
        return float(check_answer(GeneratedTask(kind, "", "", prompt.answer), text))
    printed, right = extract_final_answer(text), _number(prompt.answer)
    if right is not None:
        numbers = _NUMBER.findall(printed)
        return float(bool(numbers) and _number(numbers[-1]) == right)
    return float(_bare(printed) == _bare(prompt.answer))


def think_format(prompt: Prompt, text: str) -> float:
    """1 where the text is one non-empty `<think>` span, then one non-empty `<answer>` span and
    nothing else; otherwise 1/8 for each of the four marks that occurs exactly once.
    """
    marks = ("<think>", "</think>", "<answer>", "</answer>")
    once = sum(text.count(mark) == 1 for mark in marks)
    whole = re.fullmatch(
        r"\s*<think>(.*\S.*)</think>\s*<answer>(.*\S.*)</answer>\s*", text, flags=re.DOTALL
    )
    return 1.0 if whole and once == len(marks) else once / 8


def length_reward(prompt: Prompt, text: str, *, low: int, high: int) -> float:
    """1 from `low` to `high` characters, falling to 0 at none, and at twice `high`."""
    count = len(text.strip())
    if count < low:
        return count / low
    return 1.0 if count <= high else max(0.0, 2 - count / high)


def distinct_ngrams(prompt: Prompt, text: str, *, n: int = 3) -> float:
    """The share of sequences of so many words that are different: 1 where nothing repeats itself,
    and for texts that are too short to.
    """
    printed = text.split()
    runs = [tuple(printed[start : start + n]) for start in range(len(printed) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def unit_tests(prompt: Prompt, text: str, *, limits: SandboxLimits = UNIT_TEST_LIMITS) -> float:
    """1 where the answer's program passes all tests of the row, else 0.

    The program is the last fenced block of what follows `</think>`, or all of it. Tests are Python
    statements in `test_list` or `tests` (a list or a text), after `test_setup_code`. They run in
    the sandbox; whatever the program does there, it has failed if it did not come to their end. (A
    search through Python's own frames would find what to say there: the sandbox is no wall.)
    ValueError where the row has no tests.
    """
    tests = prompt.record.get("test_list") or prompt.record.get("tests")
    if not tests:
        raise ValueError("the row has neither `test_list` nor `tests`")
    printed = text.rpartition("</think>")[2]
    blocks = _CODE.findall(printed)
    setup = prompt.record.get("test_setup_code") or ""
    listed = [tests] if isinstance(tests, str) else tests
    program = "\n".join([setup, blocks[-1] if blocks else printed, *listed])
    # exit code 0 says nothing of a program that ends itself before its tests; what it must say at
    # its end is no part of its own code, where it could be read
    passed = secrets.token_hex(16)
    whole = f"exec(compile({program!r}, '<answer>', 'exec'))\nprint({passed!r})\n"
    outcome = run_python(whole, limits)
    return float(outcome.status == "ok" and outcome.output.rstrip().endswith(passed))


def make_length_reward(low: int, high: int) -> RewardFunc:
    """`length` with its bounds."""
    if not 1 <= low <= high:
        raise ValueError(f"low={low} and high={high} must be 1 <= low <= high")
    return partial(length_reward, low=low, high=high)


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _bare(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")

"""Reward functions: functions of a prompt and the text of a completion.

All functions in this module give values from 0 to 1. `score_responses` computes weighted sums and
tolerates failures: a reward that raises, exits or is not finite counts as its `fallback` and is
reported with its prompt.
"""

import math
import re
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from tinsmith.core.sandbox import SandboxLimits, run_python
from tinsmith.data.formats.prompts import Prompt
from tinsmith.data.sources.tasks import GeneratedTask, check_answer
from tinsmith.text.answers import contains_answer, is_same_answer

RewardFunc = Callable[[Prompt, str], float]
"""Function of a prompt and the text of one completion (without its end of turn)."""


class Response(NamedTuple):
    """A completion to be scored, with its prompt."""

    prompt: Prompt
    text: str
    """The last assistant message, without its end of turn."""
    ids: Sequence[int] = ()
    """Token ids of the prompt and of everything after it."""


BatchReward = Callable[[Sequence[Response]], Sequence[float | BaseException]]
"""Function that scores N completions at once: numbers, or exceptions where it failed."""

_CODE = re.compile(r"```(?:[Pp]ython|py)?[ \t]*\n(.*?)```", re.DOTALL)
UNIT_TEST_LIMITS = SandboxLimits()
"""Sandbox limits of tested programs."""


class WeightedReward(NamedTuple):
    """A reward and its weight in the sum."""

    name: str
    reward: BatchReward
    weight: float = 1.0
    fallback: float = 0.0
    """Value that replaces a failed reward."""


class RewardFailure(NamedTuple):
    """A reward that failed for one completion."""

    response_index: int
    """Index of the completion among those scored."""
    prompt_id: int
    """Index of the prompt in its source."""
    reward_name: str
    reason: str


class ScoredResponses(NamedTuple):
    """The rewards of N completions."""

    rewards: list[float]
    """(N,): weighted sums, all finite."""
    per_reward: dict[str, list[float]]
    """Unweighted rewards (N,) by reward name."""
    failures: list[RewardFailure]


def score_responses(
    weighted_rewards: Sequence[WeightedReward], responses: Sequence[Response]
) -> ScoredResponses:
    """Score N completions by every reward."""
    failures: list[RewardFailure] = []
    per_reward = {
        weighted.name: _rewards_or_fallback(weighted, responses, failures)
        for weighted in weighted_rewards
    }
    rewards = [
        math.fsum(
            weighted.weight * per_reward[weighted.name][index] for weighted in weighted_rewards
        )
        for index in range(len(responses))
    ]
    return ScoredResponses(rewards, per_reward, failures)


def as_batch_reward(reward: RewardFunc) -> BatchReward:
    """Return a batch reward that calls `reward` for each completion and returns its exceptions."""
    return lambda responses: [_reward_or_error(reward, response) for response in responses]


def _reward_or_error(reward: RewardFunc, response: Response) -> float | BaseException:
    try:
        return float(reward(response.prompt, response.text))
    except (Exception, SystemExit) as error:  # user code may fail in any way; training continues
        return error


def _rewards_or_fallback(
    weighted: WeightedReward, responses: Sequence[Response], failures: list[RewardFailure]
) -> list[float]:
    try:
        values = weighted.reward(responses)
        if len(values) != len(responses):
            raise ValueError(f"{len(values)} rewards for {len(responses)} completions")
    except (Exception, SystemExit) as error:  # user code, as above
        values = [error] * len(responses)
    rewards: list[float] = []
    for index, value in enumerate(values):
        if isinstance(value, float | int) and math.isfinite(value):
            rewards.append(float(value))
        else:
            rewards.append(weighted.fallback)
            prompt_id = responses[index].prompt.prompt_id
            failures.append(RewardFailure(index, prompt_id, weighted.name, _reason(value)))
    return rewards


def _reason(value: float | BaseException) -> str:
    raised = isinstance(value, BaseException)
    return f"{type(value).__name__}: {value}" if raised else f"returned {value}"


def exact_match(prompt: Prompt, text: str) -> float:
    """Return 1 if the completion's final answer is right, else 0.

    A generated task is checked by its own rule, any other answer by `text.answers.is_same_answer`.
    Of several ground truths in the field `gt`, the fraction that the completion contains counts
    (MiniMind). ValueError if the prompt has no answer.
    """
    if prompt.answer is None:
        raise ValueError("the row has no answer to compare with")
    truths = prompt.record.get("gt")
    if isinstance(truths, list) and len(truths) > 1:
        return sum(contains_answer(str(truth), text) for truth in truths) / len(truths)
    kind = prompt.record.get("task")
    if kind in ("arithmetic", "sort", "copy"):
        return float(check_answer(GeneratedTask(kind, "", "", prompt.answer), text))
    return float(is_same_answer(prompt.answer, text))


def think_format(prompt: Prompt, text: str) -> float:
    """Return 1 for one non-empty `<think>` span, then one non-empty `<answer>` span and nothing
    else.

    Otherwise 1/8 for each of the four tags that occurs exactly once.
    """
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    num_single = sum(text.count(tag) == 1 for tag in tags)
    match = re.fullmatch(
        r"\s*<think>(.*\S.*)</think>\s*<answer>(.*\S.*)</answer>\s*", text, flags=re.DOTALL
    )
    return 1.0 if match and num_single == len(tags) else num_single / 8


def length_reward(prompt: Prompt, text: str, *, low: int, high: int) -> float:
    """Return 1 from `low` to `high` characters, falling to 0 at none, and at twice `high`."""
    count = len(text.strip())
    if count < low:
        return count / low
    return 1.0 if count <= high else max(0.0, 2 - count / high)


def distinct_ngrams(prompt: Prompt, text: str, *, n: int = 3) -> float:
    """Return the fraction of distinct n-grams of words; 1 for texts with fewer than n words."""
    words = text.split()
    ngrams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def unit_tests(prompt: Prompt, text: str, *, limits: SandboxLimits = UNIT_TEST_LIMITS) -> float:
    """Return 1 if the completion's program passes all tests of the prompt's record, else 0.

    The program is the last fenced code block after `</think>`, or all of that text. Tests are
    Python statements in `test_list` or `tests` (a list or a text), after `test_setup_code`. They
    run in the sandbox, and the program fails unless execution reaches the end of the tests. (A
    program that searches Python's frames could find the success marker: the sandbox is no security
    boundary.) ValueError if the record has no tests.
    """
    tests = prompt.record.get("test_list") or prompt.record.get("tests")
    if not tests:
        raise ValueError("the row has neither `test_list` nor `tests`")
    completion = text.rpartition("</think>")[2]
    blocks = _CODE.findall(completion)
    setup = prompt.record.get("test_setup_code") or ""
    test_list = [tests] if isinstance(tests, str) else tests
    program = "\n".join([setup, blocks[-1] if blocks else completion, *test_list])
    # exit code 0 does not prove that the tests ran, because a program can exit before them; the
    # marker to print at the end is not part of the program, which could read it otherwise
    marker = secrets.token_hex(16)
    wrapped = f"exec(compile({program!r}, '<answer>', 'exec'))\nprint({marker!r})\n"
    outcome = run_python(wrapped, limits)
    return float(outcome.status == "ok" and outcome.output.rstrip().endswith(marker))


def make_length_reward(low: int, high: int) -> RewardFunc:
    """Return `length_reward` with these bounds."""
    if not 1 <= low <= high:
        raise ValueError(f"low={low} and high={high} must be 1 <= low <= high")
    return partial(length_reward, low=low, high=high)

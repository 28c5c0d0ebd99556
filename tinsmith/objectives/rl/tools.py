"""Turns of a conversation with tools: ids in, ids out.

What a tool says is appended to the ids that are there, as the chat template would write it after
an assistant's turn. Nothing is rendered or encoded again, so ids that were sampled stay as they
are. A call is what stands between the ids of `<tool_call>` and `</tool_call>`; the same characters
spelled out are text.

A calculator that reads text nobody has to trust: + - * / and brackets, exact, bounded.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

from tinsmith.objectives.rl.rollout import Rollout
from tinsmith.text.chat import Call, Conversation, Message, encode_chat, encode_prompt
from tinsmith.text.tokenizer import Tokenizer

MAX_EXPRESSION_CHARS = 200
"""Characters of an expression."""

MAX_RESULT_DIGITS = 60
"""Of a result's numerator or denominator."""

_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?)|([-+*/()]))")


class BadExpression(ValueError):
    """Why there is no result, in a few words."""


def calculate(expression: str) -> str:
    """The value of an arithmetic expression: a whole number, or a decimal rounded to 10 digits.

    Raises BadExpression where it is no expression, divides by zero, or is too large.
    """
    if len(expression) > MAX_EXPRESSION_CHARS:
        raise BadExpression(f"longer than {MAX_EXPRESSION_CHARS} characters")
    reader = _Reader(_tokens(expression))
    value = reader.sum()
    if reader.rest:
        raise BadExpression(f"unexpected {reader.rest[-1]}")
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


def _tokens(expression: str) -> list[str]:
    """The last first."""
    found, place = [], 0
    text = expression.rstrip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise BadExpression(f"unexpected {text[place:].lstrip()[0]}")
        found.append(match[1] or match[2])
        place = match.end()
    return found[::-1]


class _Reader:
    """Recursive descent; an expression's length bounds its depth."""

    def __init__(self, rest: list[str]):
        self.rest = rest

    def sum(self) -> Fraction:
        value = self.product()
        while self.rest and self.rest[-1] in "+-":
            sign = self.rest.pop()
            other = self.product()
            value = _bounded(value + other if sign == "+" else value - other)
        return value

    def product(self) -> Fraction:
        value = self.unit()
        while self.rest and self.rest[-1] in "*/":
            sign = self.rest.pop()
            other = self.unit()
            if sign == "/" and other == 0:
                raise BadExpression("division by zero")
            value = _bounded(value * other if sign == "*" else value / other)
        return value

    def unit(self) -> Fraction:
        if not self.rest:
            raise BadExpression("something is missing")
        word = self.rest.pop()
        if word == "-":
            return -self.unit()
        if word == "(":
            value = self.sum()
            if not self.rest or self.rest.pop() != ")":
                raise BadExpression("a bracket is not closed")
            return value
        if not word[0].isdigit():
            raise BadExpression(f"unexpected {word}")
        return _bounded(Fraction(word))


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= 10**MAX_RESULT_DIGITS:
        raise BadExpression(f"more than {MAX_RESULT_DIGITS} digits")
    return value


ToolName = Literal["calculator"]

Tool = Callable[[Mapping[str, Any]], str]
"""Arguments to an answer; ValueError, with a few words for the model, where there is none."""


def calculator(arguments: Mapping[str, Any]) -> str:
    """`{"expression": "12 * (3 + 4)"}` -> `84`."""
    expression = arguments.get("expression")
    if not isinstance(expression, str):
        raise BadExpression("expression must be text")
    return calculate(expression)


TOOLS: dict[ToolName, Tool] = {"calculator": calculator}


class ToolRunner:
    """Answers the calls of a policy, for as many turns as an episode may have."""

    def __init__(self, tokenizer: Tokenizer, names: Sequence[ToolName], max_turns: int):
        self._tokenizer, self._turns = tokenizer, max_turns
        self._tools: dict[str, Tool] = {name: TOOLS[name] for name in names}
        self._opening, self._closing = map(tokenizer.special, ("<tool_call>", "</tool_call>"))

    def reply(self, episode: Rollout) -> list[int]:
        """Ids of what the tools say to an episode's newest turn, up to the header of the next one;
        none where nothing was called, or no turn is left.
        """
        calls = self.parse_calls(episode.last_turn_ids)
        if not calls or episode.turns >= self._turns:
            return []
        return self.observation_ids([self.execute(call) for call in calls])

    def parse_calls(self, ids: Sequence[int]) -> list[str]:
        """What stands between the tags of every call in a turn, as text."""
        found: list[str] = []
        start: int | None = None
        for place, token in enumerate(ids):
            if token == self._opening:
                start = place + 1
            elif token == self._closing and start is not None:
                found.append(self._tokenizer.decode(list(ids[start:place])))
                start = None
        return found

    def execute(self, call: str) -> str:
        """What a tool says to a call, or what is wrong with the call."""
        try:
            requested = json.loads(call)
        except (ValueError, RecursionError):
            return "error: a call is a JSON object"
        if not isinstance(requested, dict) or not isinstance(requested.get("arguments"), dict):
            return "error: a call has a name and arguments"
        tool = self._tools.get(str(requested.get("name")))
        if tool is None:
            return f"error: there is no such tool; there is {', '.join(self._tools)}"
        try:
            return tool(requested["arguments"])
        except ValueError as error:
            return f"error: {error}"

    def observation_ids(self, results: Sequence[str]) -> list[int]:
        """What follows the end of an assistant's turn: the results, and the header of the next
        turn.
        """
        call = Call(name="calculator", arguments={})
        requested = Message(role="user", content="?")
        output = Message(role="assistant", content="", calls=(call,) * len(results))
        reported = [Message(role="tool", content=result) for result in results]
        before = encode_chat(self._tokenizer, Conversation(messages=(requested, output)))
        turn = len(before.mask) - before.mask[::-1].index(True)
        whole = encode_prompt(
            self._tokenizer, Conversation(messages=(requested, output, *reported))
        )
        assert whole[:turn] == before.ids[:turn], "a template never changes what was said"
        return whole[turn:]

"""Tool calls in completions: find the calls, run the tools.

A call is the JSON between the ids of `<tool_call>` and `</tool_call>`. The same characters spelled
out as ordinary tokens are text and never run a tool.

The calculator reads untrusted text: + - * / and brackets, exact fractions, bounded in length and
digits.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

from tinsmith.text.tokenizer import Tokenizer

Tool = Callable[[Mapping[str, Any]], str]
"""Takes the arguments of a call and returns the result. A ValueError's message goes to the model.
"""

MAX_EXPRESSION_CHARS = 200
"""Largest length of an expression in characters."""
MAX_RESULT_DIGITS = 60
"""Largest number of digits of a result's numerator and denominator."""

_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?)|([-+*/()]))")


def parse_tool_calls(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text of every tool call in a turn: what is between the ids of the tags."""
    opening, closing = map(tokenizer.special, ("<tool_call>", "</tool_call>"))
    calls: list[str] = []
    start: int | None = None
    for index, token in enumerate(ids):
        if token == opening:
            start = index + 1
        elif token == closing and start is not None:
            calls.append(tokenizer.decode(list(ids[start:index])))
            start = None
    return calls


def run_tool_call(tools: Mapping[str, Tool], call: str) -> str:
    """Run one call, `{"name": ..., "arguments": {...}}`, and return the tool's result.

    A call that is not valid, or an unknown tool, returns a text that begins with `error:`.
    """
    try:
        parsed = json.loads(call)
    except (ValueError, RecursionError):
        return "error: a call is a JSON object"
    if not isinstance(parsed, dict) or not isinstance(parsed.get("arguments"), dict):
        return "error: a call has a name and arguments"
    tool = tools.get(str(parsed.get("name")))
    if tool is None:
        return f"error: unknown tool; use {', '.join(tools)}"
    try:
        return tool(parsed["arguments"])
    except ValueError as error:
        return f"error: {error}"


class BadExpression(ValueError):
    """An expression without a value. The message is a short reason."""


def calculate(expression: str) -> str:
    """Return the value of an arithmetic expression: a whole number, or a decimal rounded to 10
    digits.

    Raise BadExpression if it is not an expression, divides by zero, or is too large.
    """
    if len(expression) > MAX_EXPRESSION_CHARS:
        raise BadExpression(f"longer than {MAX_EXPRESSION_CHARS} characters")
    parser = _ExpressionParser(_tokens(expression))
    value = parser.sum()
    if parser.rest:
        raise BadExpression(f"unexpected {parser.rest[-1]}")
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


def _tokens(expression: str) -> list[str]:
    """Return the tokens in reverse order, so that `pop` takes the next one."""
    tokens, start = [], 0
    text = expression.rstrip()
    while start < len(text):
        match = _TOKEN.match(text, start)
        if match is None:
            raise BadExpression(f"unexpected {text[start:].lstrip()[0]}")
        tokens.append(match[1] or match[2])
        start = match.end()
    return tokens[::-1]


class _ExpressionParser:
    """Recursive descent over reversed tokens. The expression's length bounds the depth."""

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
        part = self.rest.pop()
        if part == "-":
            return -self.unit()
        if part == "(":
            value = self.sum()
            if not self.rest or self.rest.pop() != ")":
                raise BadExpression("a bracket is not closed")
            return value
        if not part[0].isdigit():
            raise BadExpression(f"unexpected {part}")
        return _bounded(Fraction(part))


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= 10**MAX_RESULT_DIGITS:
        raise BadExpression(f"more than {MAX_RESULT_DIGITS} digits")
    return value


def calculator(arguments: Mapping[str, Any]) -> str:
    """Calculate `{"expression": "12 * (3 + 4)"}`: `84`."""
    expression = arguments.get("expression")
    if not isinstance(expression, str):
        raise BadExpression("expression must be text")
    return calculate(expression)


ToolName = Literal["calculator"]
TOOLS: dict[ToolName, Tool] = {"calculator": calculator}
CALCULATOR_TOOL: dict[str, Any] = {
    "name": "calculator",
    "parameters": {"expression": "numbers, + - * / and brackets"},
}
TOOL_SPECS: dict[ToolName, dict[str, Any]] = {"calculator": CALCULATOR_TOOL}
"""JSON description of every tool, as the chat template shows it to the model."""

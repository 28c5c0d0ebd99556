"""Tool calls in completions: how they are found and run, and what the calculator accepts."""

import random
from fractions import Fraction

import pytest

from tinsmith.text.bpe import train_bpe
from tinsmith.text.tools import (
    BadExpression,
    calculate,
    calculator,
    parse_tool_calls,
    run_tool_call,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["What is 12 + 34? calculator expression name arguments"] * 50, 300)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", "7"),
        ("(1 + 2) * 3", "9"),
        ("10 - 4 - 3", "3"),
        ("100 / 10 / 5", "2"),
        ("-(-5)", "5"),
        ("2*-3", "-6"),
        ("1/3", "0.3333333333"),
        ("0.1 + 0.2", "0.3"),
        ("007", "7"),
        (" 12345678901234567890 * 10 ", "123456789012345678900"),
    ],
)
def test_calculator_computes_exactly(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *("", " ", "1 +", "(1", "1)", "1 2", "a", "1e9", "2 ** 3", "1 / 0", "1 / (2 - 2)", "()"),
        *("__import__('os')", "1;2", "9" * 61, "9" * 300, "(" * 199, "-" * 200, ".5", "5."),
        "*".join(["9" * 20] * 5),
    ],
)
def test_calculator_refuses_invalid_or_too_large_expressions(expression):
    with pytest.raises(BadExpression):
        calculate(expression)


def test_calculator_agrees_with_fractions():
    numbers = random.Random(0)

    def grown(depth: int) -> tuple[str, Fraction]:
        if depth == 0:
            value = numbers.randrange(100)
            return str(value), Fraction(value)
        (a, x), (b, y) = grown(depth - 1), grown(numbers.randrange(depth))
        sign = numbers.choice("+-*")
        return f"({a}) {sign} ({b})", {"+": x + y, "-": x - y, "*": x * y}[sign]

    for _ in range(100):
        text, value = grown(3)
        assert calculate(text) == str(value)


@pytest.mark.parametrize(
    ("call", "result"),
    [
        ("12", "error: a call has"),
        ("nonsense", "error: a call is"),
        ("[" * 5000, "error: a call is"),
        ('{"name": "shell", "arguments": {}}', "error: unknown tool"),
        ('{"name": "calculator", "arguments": "1"}', "error: a call has"),
        ('{"name": "calculator", "arguments": {"expression": 3}}', "error: expression must"),
        ('{"name": "calculator", "arguments": {"expression": "1/0"}}', "error: division by zero"),
        ('{"name": "calculator", "arguments": {"expression": "6*7"}}', "42"),
    ],
)
def test_a_call_returns_the_result_or_what_is_wrong_with_it(call, result):
    assert run_tool_call({"calculator": calculator}, call).startswith(result)


def test_spelled_out_tags_and_unclosed_calls_are_no_calls(tokenizer):
    opening = tokenizer.special("<tool_call>")
    closing = tokenizer.special("</tool_call>")
    assert parse_tool_calls(tokenizer, tokenizer.encode("<tool_call>1</tool_call>")) == []
    assert parse_tool_calls(tokenizer, [opening, *tokenizer.encode("1")]) == []
    assert parse_tool_calls(tokenizer, [closing, *tokenizer.encode("1"), closing]) == []
    two = [opening, *tokenizer.encode("1"), closing, opening, *tokenizer.encode("2"), closing]
    assert parse_tool_calls(tokenizer, two) == ["1", "2"]

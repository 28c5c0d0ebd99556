"""A calculator that reads text nobody has to trust: + - * / and brackets, exact, bounded."""

import re
from fractions import Fraction

LONGEST = 200
"""Characters of an expression."""
DIGITS = 60
"""Of a result's numerator or denominator."""
_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?)|([-+*/()]))")


class BadExpression(ValueError):
    """Why there is no result, in a few words."""


def calculate(expression: str) -> str:
    """The value of an arithmetic expression: a whole number, or a decimal rounded to 10 digits.

    Raises BadExpression where it is no expression, divides by zero, or is too large.
    """
    if len(expression) > LONGEST:
        raise BadExpression(f"longer than {LONGEST} characters")
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
    if max(abs(value.numerator), value.denominator) >= 10**DIGITS:
        raise BadExpression(f"more than {DIGITS} digits")
    return value

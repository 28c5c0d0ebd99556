"""Generated tasks whose answer can be checked: arithmetic, sorting, copying, and arithmetic in
words for a calculator.

A task is a pure function of (name, seed, index, digits, length): the same everywhere, and there is
no end of them. The reasoning is a worked solution that a small model can learn to follow, one short
step per line.
"""

import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from tinsmith.text.tools import CALCULATOR_TOOL

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class GeneratedTask(NamedTuple):
    """A question, a worked solution, and the answer that `check` looks for."""

    name: str
    question: str
    reasoning: str
    answer: str
    expression: str = ""
    """What a calculator is to be asked, where there is one."""

    def text(self) -> str:
        """The task as a document."""
        return f"{self.question}\n{self.reasoning}\nAnswer: {self.answer}\n"

    def chat(self, *, reasoning: bool = True, answer_tags: bool = False) -> dict[str, Any]:
        """The task as a chat record: the reasoning becomes the assistant's `thoughts`, if it is to
        have any, or a call of the calculator what it says first; `tagged` puts the answer into
        `<answer>`.
        """
        requested = {"role": "user", "content": self.question}
        if self.name == "calculator":
            output = {"role": "assistant", "content": self.answer}
            return {"tools": [CALCULATOR_TOOL], "messages": [requested, *self._called(), output]}
        output = f"<answer>{self.answer}</answer>" if answer_tags else self.answer
        return {"messages": [requested, self._answered(output, reasoning)]}

    def with_error(self) -> "GeneratedTask":
        """The task with a wrong answer: of numbers the one above, and of a calculator's task with
        nobody asked.
        """
        if self.name not in ("arithmetic", "calculator"):
            return self._replace(answer=self.wrong_answer())
        return self._replace(answer=str(int(self.answer) + 1), expression="")

    def prompt(self) -> dict[str, Any]:
        """The task as a prompt record, with the answer and the kind of task."""
        tools = {"tools": [CALCULATOR_TOOL]} if self.name == "calculator" else {}
        return {"prompt": self.question, "answer": self.answer, "task": self.name} | tools

    def pair(self, *, reasoning: bool = True) -> dict[str, Any]:
        """The task as a record of a pair: the right answer against a wrong one after the same
        thoughts.
        """
        right, wrong = (
            self._answered(output, reasoning) for output in (self.answer, self.wrong_answer())
        )
        return {"prompt": self.question, "chosen": right, "rejected": wrong}

    def _called(self) -> list[dict[str, Any]]:
        """The call of the calculator and what it says, if it is asked."""
        if not self.expression:
            return []
        call = {"name": CALCULATOR_TOOL["name"], "arguments": {"expression": self.expression}}
        return [
            {"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
            {"role": "tool", "content": self.answer},
        ]

    def _answered(self, output: str, thoughts: bool) -> dict[str, str]:
        thinks = {"reasoning_content": self.reasoning} if thoughts else {}
        return {"role": "assistant", **thinks, "content": output}

    def wrong_answer(self) -> str:
        """A wrong answer that is nearly right: off by a little, or two neighbours swapped. A pure
        function of the task.
        """
        numbers = random.Random(f"{self.question}/{self.answer}")
        if self.name in ("arithmetic", "calculator"):
            return str(int(self.answer) + numbers.choice((-10, -2, -1, 1, 2, 10)))
        items = self.answer.split()
        places = [i for i in range(len(items) - 1) if items[i] != items[i + 1]]
        if not places:
            return " ".join([*items, items[-1]])
        place = numbers.choice(places)
        items[place : place + 2] = items[place + 1], items[place]
        return " ".join(items)


def generate_task(
    name: str, seed: int, index: int, *, digits: int = 3, length: int = 8
) -> GeneratedTask:
    """Task number `index` of kind `name` (`arithmetic`, `sort`, `copy` or `calculator`).

    `digits`: of a number, at most; `length`: numbers to sort or letters to copy, at most.
    """
    numbers = random.Random(f"{name}/{seed}/{index}/{digits}/{length}")
    return _MAKERS[name](numbers, digits, length)


def check_answer(task: GeneratedTask, text: str) -> bool:
    """Whether a reply answers the task.

    What counts is `final(text)`. Blanks do not matter; of a sum the last number counts, so that
    "The answer is 42." is right.
    """
    output = extract_final_answer(text)
    if task.name in ("arithmetic", "calculator"):
        found = re.findall(r"-?\d+", output)
        return bool(found) and found[-1] == task.answer
    return output.split() == task.answer.split()


def extract_final_answer(text: str) -> str:
    """What a reply says in the end: what follows `</think>`, and there the last `<answer>` span
    where there is one; without marks of ends.
    """
    output = text.rpartition("</think>")[2]
    spans = re.findall(r"<answer>(.*?)</answer>", output, flags=re.DOTALL)
    output = spans[-1] if spans else output
    return output.replace("<|im_end|>", " ").replace("<|endoftext|>", " ")


def _arithmetic(numbers: random.Random, digits: int, length: int) -> GeneratedTask:
    sign = numbers.choice("+-*")
    left, right = _number(numbers, digits), _number(numbers, digits if sign != "*" else 1)
    requested = numbers.choice(
        ["What is {} {} {}?", "Calculate {} {} {}.", "{} {} {} = ?", "Work out {} {} {}."]
    )
    steps, answer = {"+": _add, "-": _subtract, "*": _multiply}[sign](left, right)
    return GeneratedTask("arithmetic", requested.format(left, sign, right), steps, str(answer))


def _calculator(numbers: random.Random, digits: int, length: int) -> GeneratedTask:
    """Words whose order is not always that of the expression."""
    a, b, c = (_number(numbers, digits) for _ in range(3))
    question, expression, answer = numbers.choice(
        [
            (f"What is {a} plus {b}?", f"{a} + {b}", a + b),
            (f"Take {a} away from {b}.", f"{b} - {a}", b - a),
            (f"How much is {a} times {b}?", f"{a} * {b}", a * b),
            (f"Add {a} and {b}, then multiply by {c}.", f"({a} + {b}) * {c}", (a + b) * c),
            (f"Take {a} times {b} away from {c}.", f"{c} - {a} * {b}", c - a * b),
        ]
    )
    return GeneratedTask(
        "calculator", question, f"{expression} = {answer}", str(answer), expression
    )


def _add(left: int, right: int) -> tuple[str, int]:
    """Column by column from the right, with the carry."""
    steps, carry = [], 0
    for place in range(max(len(str(left)), len(str(right)))):
        a, b = left // 10**place % 10, right // 10**place % 10
        total = a + b + carry
        steps.append(f"{a} + {b} + {carry} = {total}, write {total % 10} carry {total // 10}")
        carry = total // 10
    return "\n".join(steps), left + right


def _subtract(left: int, right: int) -> tuple[str, int]:
    """The smaller from the larger, column by column with the borrow, then the sign."""
    large, small = max(left, right), min(left, right)
    steps, borrow = [f"{large} - {small}"], 0
    for place in range(len(str(large))):
        a, b = large // 10**place % 10, small // 10**place % 10
        rest = a - b - borrow
        steps.append(f"{a} - {b} - {borrow} = {rest}, write {rest % 10} borrow {int(rest < 0)}")
        borrow = int(rest < 0)
    if left < right:
        steps.append(f"{left} < {right}, so the sign is -")
    return "\n".join(steps), left - right


def _multiply(left: int, right: int) -> tuple[str, int]:
    """Each digit of the left number times the right one, summed up."""
    steps, total = [], 0
    for place, digit in enumerate(reversed(str(left))):
        part = int(digit) * 10**place
        steps.append(
            f"{part} * {right} = {part * right}, {total} + {part * right} = {total + part * right}"
        )
        total += part * right
    return "\n".join(steps), total


def _sort(numbers: random.Random, digits: int, length: int) -> GeneratedTask:
    items = [
        _number(numbers, min(digits, 2)) for _ in range(numbers.randint(min(2, length), length))
    ]
    downwards = numbers.random() < 0.25
    order = "from large to small" if downwards else "from small to large"
    requested = numbers.choice(
        ["Sort these numbers {}: {}", "Put these numbers in order, {}: {}", "Sort {}: {}"]
    )
    left, steps = list(items), []
    while left:
        chosen = max(left) if downwards else min(left)
        steps.append(f"{_list(left)}: take {chosen}")
        left.remove(chosen)
    return GeneratedTask(
        "sort",
        requested.format(order, _list(items)),
        "\n".join(steps),
        _list(sorted(items, reverse=downwards)),
    )


def _copy(numbers: random.Random, digits: int, length: int) -> GeneratedTask:
    letters = [numbers.choice(LETTERS) for _ in range(numbers.randint(1, length))]
    backwards = numbers.random() < 0.25
    requested = (
        "Write these letters backwards: {}"
        if backwards
        else numbers.choice(["Copy these letters: {}", "Repeat: {}"])
    )
    answer = letters[::-1] if backwards else letters
    steps = f"{len(letters)} letters, {'last' if backwards else 'first'} {answer[0]}"
    return GeneratedTask("copy", requested.format(" ".join(letters)), steps, " ".join(answer))


def _number(numbers: random.Random, digits: int) -> int:
    """A number of 1 to `digits` digits, every count of digits equally often."""
    return numbers.randrange(10 ** numbers.randint(1, digits))


def _list(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


_MAKERS: dict[str, Callable[[random.Random, int, int], GeneratedTask]] = {
    "arithmetic": _arithmetic,
    "sort": _sort,
    "copy": _copy,
    "calculator": _calculator,
}

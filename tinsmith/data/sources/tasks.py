"""Generated tasks whose answer can be checked, `kind: tasks`: arithmetic, sorting, copying, and
arithmetic in words for a calculator.

A task is a pure function of (name, seed, index, digits, length). The reasoning is a worked solution
that a small model can learn to follow, one short step per line.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tinsmith.core.parse import Count, to_plain
from tinsmith.data.documents import Document, limit_documents
from tinsmith.data.formats.base import DataFormat
from tinsmith.data.sources.base import DataSource, SourceConfig, SourceContext
from tinsmith.text.answers import strip_reasoning
from tinsmith.text.tools import CALCULATOR_TOOL

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TaskName = Literal["arithmetic", "sort", "copy", "calculator"]


@dataclass(frozen=True, kw_only=True)
class TasksData(SourceConfig):
    """Generated tasks with an answer that can be checked; `digits` and `length` set how hard they
    are.
    """

    kind: Literal["tasks"] = "tasks"
    validation: float = 0.05
    tasks: tuple[TaskName, ...] = ("arithmetic", "sort", "copy")
    count: Count = 20_000
    seed: int = 0
    digits: int = 3
    """Largest number of digits of a number."""
    length: int = 8
    """Largest count of numbers to sort or letters to copy."""
    answer_tags: bool = False
    """If True, the answers of chats are inside `<answer>`."""
    reasoning: bool = True
    """If True, the assistant of a chat or pair gives a worked solution before the answer."""
    error_rate: float = 0.0
    """Fraction of chats with a wrong label (a number one too high, the calculator not called), so
    that preferences and rewards have something to correct.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise ValueError("tasks must name at least one of arithmetic, sort, copy, calculator")
        if not 0 <= self.error_rate <= 1:
            raise ValueError(f"error_rate={self.error_rate} must be a fraction from 0 to 1")
        for name, value, highest in (
            ("count", self.count, 10**9),
            ("digits", self.digits, 9),
            ("length", self.length, 99),
        ):
            if not 1 <= value <= highest:
                raise ValueError(f"{name}={value} must be from 1 to {highest}")

    def has_conversations(self, data_format: DataFormat) -> bool:
        """Return True if the source's samples are conversations in this data format."""
        return True

    def open(self, data_format: DataFormat, context: SourceContext) -> DataSource:
        """Generate the tasks while they are read."""
        stream = limit_documents(lambda: self._documents(data_format), self.limit)
        return DataSource("tasks", self, to_plain(self), stream)

    def _documents(self, data_format: DataFormat) -> Iterator[Document]:
        """Yield the tasks as documents. The question is split by its solution, not its wording."""
        for index in range(self.count):
            name = self.tasks[index % len(self.tasks)]
            task = generate_task(name, self.seed, index, digits=self.digits, length=self.length)
            record = data_format.record(_TaskSample(task, index, self))
            content = record if isinstance(record, str) else data_format.read(record)
            solution = f"{task.name}\n{task.reasoning}\n{task.answer}"
            yield Document(content, solution.encode(), "tasks", index)


class GeneratedTask(NamedTuple):
    """A question, a worked solution, and the answer that `check` looks for."""

    name: str
    question: str
    reasoning: str
    answer: str
    expression: str = ""
    """Expression for the calculator, in `calculator` tasks."""

    def text(self) -> str:
        """Return the task as a document."""
        return f"{self.question}\n{self.reasoning}\nAnswer: {self.answer}\n"

    def chat(self, *, reasoning: bool = True, answer_tags: bool = False) -> dict[str, Any]:
        """Return the task as a chat record.

        A `calculator` task calls the calculator first. In other tasks, `reasoning` adds the worked
        solution, and `answer_tags` puts the answer into `<answer>`.
        """
        question = {"role": "user", "content": self.question}
        if self.name == "calculator":
            reply = {"role": "assistant", "content": self.answer}
            return {"tools": [CALCULATOR_TOOL], "messages": [question, *self._tool_call(), reply]}
        answer = f"<answer>{self.answer}</answer>" if answer_tags else self.answer
        return {"messages": [question, self._reply(answer, reasoning)]}

    def with_error(self) -> "GeneratedTask":
        """Return the task with a wrong label: a number one too high. A `calculator` task then does
        not call the calculator.
        """
        if self.name not in ("arithmetic", "calculator"):
            return self._replace(answer=self.wrong_answer())
        return self._replace(answer=str(int(self.answer) + 1), expression="")

    def prompt(self) -> dict[str, Any]:
        """Return the task as a prompt record with the answer and the task name."""
        tools = {"tools": [CALCULATOR_TOOL]} if self.name == "calculator" else {}
        return {"prompt": self.question, "answer": self.answer, "task": self.name} | tools

    def pair(self, *, reasoning: bool = True) -> dict[str, Any]:
        """Return the task as a preference pair: the right and a wrong answer after the same worked
        solution.
        """
        right, wrong = (
            self._reply(answer, reasoning) for answer in (self.answer, self.wrong_answer())
        )
        return {"prompt": self.question, "chosen": right, "rejected": wrong}

    def _tool_call(self) -> list[dict[str, Any]]:
        """Return the calculator call and its result as messages; none without an expression."""
        if not self.expression:
            return []
        call = {"name": CALCULATOR_TOOL["name"], "arguments": {"expression": self.expression}}
        return [
            {"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
            {"role": "tool", "content": self.answer},
        ]

    def _reply(self, answer: str, with_reasoning: bool) -> dict[str, str]:
        reasoning = {"reasoning_content": self.reasoning} if with_reasoning else {}
        return {"role": "assistant", **reasoning, "content": answer}

    def wrong_answer(self) -> str:
        """Return a wrong answer that is nearly right: off by a little, or two neighbours swapped. A
        pure function of the task.
        """
        numbers = random.Random(f"{self.question}/{self.answer}")
        if self.name in ("arithmetic", "calculator"):
            return str(int(self.answer) + numbers.choice((-10, -2, -1, 1, 2, 10)))
        items = self.answer.split()
        unequal = [i for i in range(len(items) - 1) if items[i] != items[i + 1]]
        if not unequal:
            return " ".join([*items, items[-1]])
        first = numbers.choice(unequal)
        items[first : first + 2] = items[first + 1], items[first]
        return " ".join(items)


class _TaskSample(NamedTuple):
    """A generated task with the settings of its source, as records of every format."""

    task: GeneratedTask
    index: int
    config: TasksData

    def text(self) -> str:
        return self.task.text()

    def chat(self) -> dict[str, Any]:
        draw = random.Random(f"slip/{self.config.seed}/{self.index}").random()
        task = self.task.with_error() if draw < self.config.error_rate else self.task
        return task.chat(reasoning=self.config.reasoning, answer_tags=self.config.answer_tags)

    def pair(self) -> dict[str, Any]:
        return self.task.pair(reasoning=self.config.reasoning)

    def prompt(self) -> dict[str, Any]:
        return self.task.prompt()


def generate_task(
    name: str, seed: int, index: int, *, digits: int = 3, length: int = 8
) -> GeneratedTask:
    """Task number `index` of kind `name` (`arithmetic`, `sort`, `copy` or `calculator`).

    `digits`: of a number, at most; `length`: numbers to sort or letters to copy, at most.
    """
    numbers = random.Random(f"{name}/{seed}/{index}/{digits}/{length}")
    return _MAKERS[name](numbers, digits, length)


def check_answer(task: GeneratedTask, text: str) -> bool:
    """Return True if a reply answers the task.

    Reasoning is left out (`strip_reasoning`) and whitespace does not matter. In arithmetic the last
    number counts, so that "The answer is 42." is right.
    """
    output = strip_reasoning(text)
    if task.name in ("arithmetic", "calculator"):
        found = re.findall(r"-?\d+", output)
        return bool(found) and found[-1] == task.answer
    return output.split() == task.answer.split()


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

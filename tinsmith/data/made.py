"""Data that Tinsmith brings along or makes: the source of Python's standard library, tasks, and
puzzles.
"""

import itertools
import platform
import random
from collections.abc import Iterable, Iterator
from typing import Any

from tinsmith.core.parse import plain
from tinsmith.data import stdlib, tasks
from tinsmith.data.arc import Task
from tinsmith.data.config import Arc, Shape, Stdlib, Tasks
from tinsmith.data.documents import READERS, Document, Origin, limited
from tinsmith.data.files import Reject
from tinsmith.data.grids import drawn
from tinsmith.data.lessons import Lesson
from tinsmith.data.rules import SEEN, generated


def from_stdlib(config: Stdlib, shape: Shape) -> Origin:
    """Modules, or chats about their functions."""
    found = list(stdlib.read(stdlib.modules()))
    kept: list[Document] = []

    def read() -> Iterator[Document]:
        if not kept:
            every = _stdlib_texts(found) if shape == "documents" else _stdlib_chats(found, shape)
            kept.extend(itertools.islice(every, config.limit))
        return iter(kept)

    identity = [
        plain(config),
        platform.python_version(),
        len(found),
        sum(len(module.text) for module in found),
    ]
    return Origin("stdlib", config, identity, read)


def _stdlib_texts(found: list[stdlib.Module]) -> Iterator[Document]:
    for module in found:
        yield Document(module.text, module.name.encode(), module.name, 1)


def _stdlib_chats(found: list[stdlib.Module], shape: Shape) -> Iterator[Document]:
    """Chats split by file; a function that occurs in two files is taken once."""
    seen: set[str] = set()
    for module in found:
        for number, record in enumerate(stdlib.chats(module), 1):
            answer = record["messages"][-1]["content"]
            if answer not in seen:
                seen.add(answer)
                content = READERS[shape](record)
                yield Document(content, module.name.encode(), module.name, number)


def from_tasks(config: Tasks, shape: Shape) -> Origin:
    """Tasks, each made when it is read."""
    return Origin(
        "tasks", config, plain(config), limited(lambda: _tasks(config, shape), config.limit)
    )


def _tasks(config: Tasks, shape: Shape) -> Iterator[Document]:
    for index in range(config.count):
        name = config.tasks[index % len(config.tasks)]
        task = tasks.generate(name, config.seed, index, digits=config.digits, length=config.length)
        row = task.text() if shape == "documents" else _row(task, index, shape, config)
        content = row if isinstance(row, str) else READERS[shape](row)
        # the split goes by what is asked, in whatever words
        solution = f"{task.name}\n{task.reasoning}\n{task.answer}"
        yield Document(content, solution.encode(), "tasks", index)


def _row(task: tasks.Task, index: int, shape: Shape, config: Tasks) -> dict[str, Any]:
    """A task as a record of chats, pairs or prompts."""
    if shape in ("chats", "answers"):
        slips = random.Random(f"slip/{config.seed}/{index}").random() < config.mistakes
        said = task.slipped() if slips else task
        return said.chat(thoughts=config.thoughts, tagged=config.tagged)
    return task.pair(thoughts=config.thoughts) if shape == "pairs" else task.prompt()


def from_rules(config: Arc) -> Origin:
    """Puzzles of generated rules."""
    stream = limited(lambda: lessons(config, _generated(config)), config.limit)
    return Origin("arc", config, plain(config), stream)


def _generated(config: Arc) -> Iterator[Task]:
    found = generated(config.rules or SEEN, config.seed, config.count, config.sizes)
    for index, puzzle in enumerate(found):
        yield Task((puzzle,), "arc", index)


def lessons(config: Arc, found: Iterable[Task | Reject]) -> Iterator[Document | Reject]:
    """Every view of every test input of a task; a task is split as a whole."""
    for task in found:
        if isinstance(task, Reject):
            yield task
            continue
        for puzzle in task.puzzles:
            for view in range(config.views):
                numbers = random.Random(f"{config.seed}/{puzzle.name}/{puzzle.number}/{view}")
                seen = drawn(
                    puzzle,
                    numbers,
                    symmetries=config.symmetries,
                    colours=config.colours,
                    order=config.order,
                )
                lesson = Lesson(seen, every_output=config.loss == "all_outputs")
                yield Document(lesson, repr(puzzle.shown).encode(), task.file, task.line)

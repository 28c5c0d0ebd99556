"""Data that Tinsmith brings along or makes: the source of Python's standard library, tasks, and
puzzles.
"""

import itertools
import platform
import random
from collections.abc import Iterable, Iterator
from typing import Any

from tinsmith.core.parse import to_plain
from tinsmith.data.arc.encoding import ArcExample
from tinsmith.data.arc.generators import TRAIN_RULES, generate_puzzles
from tinsmith.data.arc.grids import augment
from tinsmith.data.config import ArcData, DataFormat, StdlibData, TasksData
from tinsmith.data.documents import READERS, DataSource, Document, limit_documents
from tinsmith.data.files import Reject
from tinsmith.data.sources import stdlib, tasks
from tinsmith.data.sources.arc import ArcTask


def open_stdlib(config: StdlibData, data_format: DataFormat) -> DataSource:
    """Modules, or chats about their functions."""
    found = list(stdlib.read_modules(stdlib.find_modules()))
    kept: list[Document] = []

    def read() -> Iterator[Document]:
        if not kept:
            every = (
                _stdlib_texts(found)
                if data_format == "documents"
                else _stdlib_chats(found, data_format)
            )
            kept.extend(itertools.islice(every, config.limit))
        return iter(kept)

    identity = [
        to_plain(config),
        platform.python_version(),
        len(found),
        sum(len(module.text) for module in found),
    ]
    return DataSource("stdlib", config, identity, read)


def _stdlib_texts(found: list[stdlib.StdlibModule]) -> Iterator[Document]:
    for module in found:
        yield Document(module.text, module.name.encode(), module.name, 1)


def _stdlib_chats(found: list[stdlib.StdlibModule], shape: DataFormat) -> Iterator[Document]:
    """Chats split by file; a function that occurs in two files is taken once."""
    seen: set[str] = set()
    for module in found:
        for number, record in enumerate(stdlib.function_chats(module), 1):
            answer = record["messages"][-1]["content"]
            if answer not in seen:
                seen.add(answer)
                content = READERS[shape](record)
                yield Document(content, module.name.encode(), module.name, number)


def open_generated_tasks(config: TasksData, data_format: DataFormat) -> DataSource:
    """Tasks, each made when it is read."""
    return DataSource(
        "tasks",
        config,
        to_plain(config),
        limit_documents(lambda: _tasks(config, data_format), config.limit),
    )


def _tasks(config: TasksData, shape: DataFormat) -> Iterator[Document]:
    for index in range(config.count):
        name = config.tasks[index % len(config.tasks)]
        task = tasks.generate_task(
            name, config.seed, index, digits=config.digits, length=config.length
        )
        row = task.text() if shape == "documents" else _row(task, index, shape, config)
        content = row if isinstance(row, str) else READERS[shape](row)
        # the split goes by what is asked, in whatever words
        solution = f"{task.name}\n{task.reasoning}\n{task.answer}"
        yield Document(content, solution.encode(), "tasks", index)


def _row(
    task: tasks.GeneratedTask, index: int, shape: DataFormat, config: TasksData
) -> dict[str, Any]:
    """A task as a record of chats, pairs or prompts."""
    if shape in ("chats", "answers"):
        slips = random.Random(f"slip/{config.seed}/{index}").random() < config.error_rate
        output = task.with_error() if slips else task
        return output.chat(reasoning=config.reasoning, answer_tags=config.answer_tags)
    return task.pair(reasoning=config.reasoning) if shape == "pairs" else task.prompt()


def open_generated_puzzles(config: ArcData) -> DataSource:
    """Puzzles of generated rules."""
    stream = limit_documents(lambda: arc_documents(config, _generated(config)), config.limit)
    return DataSource("arc", config, to_plain(config), stream)


def _generated(config: ArcData) -> Iterator[ArcTask]:
    found = generate_puzzles(config.rules or TRAIN_RULES, config.seed, config.count, config.sizes)
    for index, puzzle in enumerate(found):
        yield ArcTask((puzzle,), "arc", index)


def arc_documents(
    config: ArcData, arc_tasks: Iterable[ArcTask | Reject]
) -> Iterator[Document | Reject]:
    """Every view of every test input of a task; a task is split as a whole."""
    for task in arc_tasks:
        if isinstance(task, Reject):
            yield task
            continue
        for puzzle in task.puzzles:
            for view in range(config.views):
                numbers = random.Random(f"{config.seed}/{puzzle.name}/{puzzle.test_index}/{view}")
                seen = augment(
                    puzzle,
                    numbers,
                    symmetries=config.symmetries,
                    colours=config.colours,
                    shuffle_demonstrations=config.shuffle_demonstrations,
                )
                example = ArcExample(seen, train_on_all_outputs=config.loss == "all_outputs")
                yield Document(example, repr(puzzle.demonstrations).encode(), task.file, task.line)

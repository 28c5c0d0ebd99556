"""Every kind of data as one thing: a stream of documents (texts or conversations) that can be read
again and again."""

import itertools
import platform
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from tinsmith.core.errors import UserError
from tinsmith.core.parse import plain
from tinsmith.data import files, hub, stdlib, tasks
from tinsmith.data.arc import Task, find_tasks, read_solutions, read_tasks
from tinsmith.data.config import Arc, Chats, DataConfig, Hub, Shape, Stdlib, Tasks, Text
from tinsmith.data.files import Reject
from tinsmith.data.grids import drawn
from tinsmith.data.lessons import Lesson
from tinsmith.data.pairs import Pair, read_pair
from tinsmith.data.prompts import Question, read_prompt
from tinsmith.data.rules import SEEN, generated
from tinsmith.text.chat import BadRecord, Conversation, Message, normalise, words

VALIDATION_NAMES = ("valid", "val", "validation")

Content = str | Conversation | Pair | Question | Lesson
_READERS: dict[Shape, Callable[[Any], Content]] = {
    "documents": normalise,
    "chats": normalise,
    "answers": normalise,
    "pairs": read_pair,
    "prompts": read_prompt,
}
"""What makes of a row what an objective reads."""


class Document(NamedTuple):
    """A text (or a piece of a long one), a conversation, a pair or a prompt, and where it came
    from."""

    content: Content
    key: bytes
    """What the split goes by; normally the content itself."""
    file: str
    line: int
    first: bool = True
    last: bool = True

    @property
    def text(self) -> str:
        """The content of a text document."""
        return cast(str, self.content)

    @property
    def bytes(self) -> int:
        """Bytes of its text."""
        return sum(len(text.encode()) for text in self.texts())

    def texts(self) -> list[str]:
        """All that is said in it, none of it empty."""
        content = self.content
        if isinstance(content, str):
            return [content]
        if isinstance(content, Lesson):
            return [content.text()]
        if isinstance(content, Question):
            return [*_said(content.asked.messages), *([content.answer] if content.answer else [])]
        if isinstance(content, Pair):
            return _said([*content.chosen.messages, content.rejected.messages[-1]])
        return _said(content.messages)

    def words(self) -> list[str]:
        """What a tokenizer learns from. Where there are tools, what a template says of them and of
        calls is longer than what is said beside, and is learned too.
        """
        content = self.content.asked if isinstance(self.content, Question) else self.content
        if isinstance(content, Conversation) and content.tools:
            return words(content)
        return self.texts()


Stream = Callable[[], Iterator[Document | Reject]]
Fetched = Callable[[Hub], Path]
"""Gives the file with the rows of a Hub data set, which it fetches at the first call."""


class Origin(NamedTuple):
    """One source of a recipe, ready to be read."""

    name: str
    config: DataConfig
    identity: Any
    """Plain data that changes when the content does."""
    train: Stream
    """All documents, or those to train on where `validation` is given."""
    validation: Stream | None = None

    @property
    def described(self) -> str:
        """What the recipe names: the path, or else the name."""
        config = self.config
        path = config.path if isinstance(config, Text | Chats | Arc) else None
        return path or self.name

    @property
    def fails(self) -> bool:
        """Whether a bad line ends everything instead of being left out."""
        config = self.config
        return isinstance(config, Text | Chats | Hub | Arc) and config.on_bad_line == "fail"


def open_origin(config: DataConfig, shape: Shape, key: str, fetched: Fetched) -> Origin:
    """Find what a section of a recipe names, without reading it yet. `key` names the section in
    messages.

    UserError where it is not there, or cannot give what `shape` asks for.
    """
    if isinstance(config, Stdlib):
        if shape == "pairs":
            raise UserError(f"{key}.kind: 'stdlib' has no pairs; use chats, tasks or hub")
        return _stdlib(config, shape)
    if isinstance(config, Tasks):
        stream = _limited(lambda: _tasks(config, shape), config.limit)
        return Origin("tasks", config, plain(config), stream)
    if isinstance(config, Arc):
        if shape in ("pairs", "prompts"):
            raise UserError(f"{key}.kind: 'arc' has no {shape}; use chats, tasks or hub")
        return _arc(config, key)
    if isinstance(config, Hub):
        return _hub(config, shape, fetched)
    if isinstance(config, Text) and shape != "documents":
        fitting = "chats, tasks or hub" if shape == "pairs" else "chats, tasks, stdlib or hub"
        aim = " to fine-tune on" if shape in ("chats", "answers") else ""
        raise UserError(f"{key}.kind: 'text' has no {shape}{aim}; use {fitting}")
    return _files(config, shape, key)


def _stdlib(config: Stdlib, shape: Shape) -> Origin:
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
                content = _READERS[shape](record)
                yield Document(content, module.name.encode(), module.name, number)


def _tasks(config: Tasks, shape: Shape) -> Iterator[Document]:
    for index in range(config.count):
        name = config.tasks[index % len(config.tasks)]
        task = tasks.generate(name, config.seed, index, digits=config.digits, length=config.length)
        row = task.text() if shape == "documents" else _row(task, index, shape, config)
        content = row if isinstance(row, str) else _READERS[shape](row)
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


def _arc(config: Arc, key: str) -> Origin:
    if config.path is None:
        stream = _limited(lambda: _lessons(config, _generated(config)), config.limit)
        return Origin("arc", config, plain(config), stream)
    found = find_tasks(config.path, f"{key}.path")
    solutions: dict[str, list[Any]] = {}
    if config.solutions is not None:
        solutions = read_solutions(config.solutions, f"{key}.solutions")
        aside = files.local(config.solutions).resolve()
        found = [path for path in found if path.resolve() != aside]
    stream = _limited(lambda: _lessons(config, read_tasks(found, solutions)), config.limit)
    identity = [plain(config), *map(_stamp, found), solutions]
    return Origin(_name(files.local(config.path)), config, identity, stream)


def _generated(config: Arc) -> Iterator[Task]:
    found = generated(config.rules or SEEN, config.seed, config.count, config.sizes)
    for index, puzzle in enumerate(found):
        yield Task((puzzle,), "arc", index)


def _lessons(config: Arc, found: Iterable[Task | Reject]) -> Iterator[Document | Reject]:
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


def _files(config: Text | Chats, shape: Shape, key: str) -> Origin:
    found = files.find(config.path, f"{key}.path")
    held_back: list[Path] = []
    if isinstance(config.validation, str):
        held_back = files.find(config.validation, f"{key}.validation")
    elif files.local(config.path).is_dir():
        found, held_back = _named_parts(found)
    if isinstance(config, Chats):
        for path in found + held_back:
            if path.name.endswith(".txt"):
                raise UserError(
                    f"{path}: chats are read from .jsonl, .jsonl.gz or .parquet, not from .txt"
                )
    stream = _limited(lambda: _read(found, config, shape), config.limit)
    held = _limited(lambda: _read(held_back, config, shape), config.limit)
    validation = held if held_back else None
    identity = [plain(config), *map(_stamp, found), "validation", *map(_stamp, held_back)]
    return Origin(_name(files.local(config.path)), config, identity, stream, validation)


def _name(path: Path) -> str:
    """A folder's name, or a file's without what follows the dot; of `stories/train.txt` it is
    `stories`."""
    whole = path.resolve()
    name = whole.name.split(".")[0]
    return whole.parent.name if name in ("train", "data") and whole.is_file() else name


def _named_parts(found: list[Path]) -> tuple[list[Path], list[Path]]:
    """A folder with train.* and valid.* (or val.*, validation.*) files says itself what is held
    back."""
    train = [path for path in found if path.name.split(".")[0] == "train"]
    held_back = [path for path in found if path.name.split(".")[0] in VALIDATION_NAMES]
    return (train, held_back) if train and held_back else (found, [])


def _read(paths: list[Path], config: Text | Chats, shape: Shape) -> Iterator[Document | Reject]:
    for path in paths:
        if path.name.endswith(".txt"):
            yield from (
                item if isinstance(item, Reject) else _text(item) for item in files.texts(path)
            )
        elif isinstance(config, Chats):
            yield from _records(files.rows(path), shape)
        else:
            yield from _fields(files.rows(path, [config.field]), config.field)


def _hub(config: Hub, shape: Shape, fetched: Fetched) -> Origin:
    def read() -> Iterator[Document | Reject]:
        rows = hub.rows(config, fetched(config))
        if shape == "documents" and config.field is not None:
            return _fields(rows, config.field)
        return _records(rows, shape)

    local = files.local(config.name)
    stamps = (
        [_stamp(path) for path in sorted(local.rglob("*")) if path.is_file()]
        if local.is_dir()
        else []
    )
    return Origin(local.name, config, [plain(config), *stamps], read)


def _text(item: files.Text) -> Document:
    return Document(item.text, item.text.encode(), item.file, item.line, item.first, item.last)


def _fields(rows: Iterator[files.Row | Reject], field: str) -> Iterator[Document | Reject]:
    for row in rows:
        if isinstance(row, Reject):
            yield row
            continue
        try:
            text = files.text_of(row.record, field)
            yield Document(text, text.encode(), row.file, row.line)
        except ValueError as error:
            yield Reject(row.file, row.line, str(error))


def _records(rows: Iterator[files.Row | Reject], shape: Shape) -> Iterator[Document | Reject]:
    for row in rows:
        if isinstance(row, Reject):
            yield row
            continue
        try:
            files.refuse_odd_text(row.record)
            content = _READERS[shape](row.record)
            yield Document(content, _key(content), row.file, row.line)
        except (BadRecord, ValueError) as error:
            yield Reject(row.file, row.line, str(error))


def _key(content: Content) -> bytes:
    """Pairs and prompts are split by what they ask, so that no prompt is on both sides."""
    return repr(content.asked if isinstance(content, Pair | Question) else content).encode()


def _said(messages: Iterable[Message]) -> list[str]:
    return [text for message in messages for text in (message.reasoning, message.content) if text]


def _limited(stream: Stream, limit: int | None) -> Stream:
    """The stream up to the end of its `limit`-th document."""
    if limit is None:
        return stream

    def read() -> Iterator[Document | Reject]:
        left = limit
        for item in stream():
            yield item
            left -= isinstance(item, Document) and item.last
            if not left:
                return

    return read


def _stamp(path: Path) -> list[Any]:
    facts = path.stat()
    return [str(path.resolve()), facts.st_size, facts.st_mtime_ns]


def unique_names(names: list[str]) -> list[str]:
    """The same names, the second of two equal ones as `name-2` and so on."""
    seen: list[str] = []
    for name in names:
        candidates = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        seen.append(next(candidate for candidate in candidates if candidate not in seen))
    return seen

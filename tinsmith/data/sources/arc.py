"""Puzzles in ARC-AGI's public JSON format, or generated ones: `kind: arc`.

    {"train": [{"input": [[0, 1], ...], "output": [[...]]}, ...], "test": [{"input": ...}, ...]}

A file holds one task, or many as {id: task}; a .jsonl or .jsonl.gz file one task per line, with its
`id`. Test outputs may be missing if a file of solutions has them, {id: [output, ...]}.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.core.parse import Count, did_you_mean, to_plain
from tinsmith.data import files
from tinsmith.data.arc.encoding import ArcExample
from tinsmith.data.arc.generators import TRAIN_RULES, Sizes, generate_puzzles
from tinsmith.data.arc.grids import MAX_GRID_SIZE, Grid, Pair, Puzzle, augment
from tinsmith.data.documents import Document, limit_documents
from tinsmith.data.files import Reject
from tinsmith.data.formats.base import DataFormat
from tinsmith.data.sources.base import (
    DataSource,
    OnBadLine,
    SourceConfig,
    SourceContext,
    file_stamp,
    source_name,
)
from tinsmith.text.grid_vocab import NUM_COLOURS

SUFFIXES = (".json", ".jsonl", ".jsonl.gz")
Solutions = dict[str, list[Any]]


@dataclass(frozen=True, kw_only=True)
class ArcData(SourceConfig):
    """Puzzles of grids: your own in ARC-AGI's JSON format, or generated ones."""

    kind: Literal["arc"] = "arc"
    validation: float = 0.05
    path: str | None = None
    """File of one or many tasks, or a folder of files; null generates tasks."""
    solutions: str | None = None
    """File with the test outputs, if the tasks do not have them."""
    on_bad_line: OnBadLine = "reject"
    loss: Literal["test_only", "all_outputs"] = "all_outputs"
    """Outputs that are trained: those of the tests, or of the demonstrations too."""
    views: Count = 1
    """Number of augmented views per task."""
    symmetries: bool = True
    """If True, views are rotated and mirrored."""
    colours: Literal["all", "keep_0", "none"] = "keep_0"
    """Colours that a view permutes."""
    shuffle_demonstrations: bool = True
    """If True, views shuffle the demonstrations."""
    seed: int = 0
    rules: tuple[str, ...] = ()
    """Names of rules in `arc.generators.TRAIN_RULES` to generate from; empty for all."""
    count: Count = 10_000
    """Number of tasks to generate."""
    min_grid_size: int = 3
    max_grid_size: int = 6
    """Rows and columns of a generated input."""
    demonstrations: int = 3
    """Number of demonstrations of a generated task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solutions is not None and self.path is None:
            raise ValueError("solutions belong to tasks at a path; set data.path too")
        for name in self.rules:
            if name not in TRAIN_RULES:
                raise ValueError(
                    f"rules: '{name}' is not a training rule{did_you_mean(name, list(TRAIN_RULES))}"
                )
        for name, lowest, highest in (
            *(("views", 1, 10**6), ("count", 1, 10**9), ("min_grid_size", 3, self.max_grid_size)),
            *(("max_grid_size", 3, 10), ("demonstrations", 1, 10)),
        ):
            if not lowest <= (value := getattr(self, name)) <= highest:
                raise ValueError(f"{name}={value} must be from {lowest} to {highest}")

    @property
    def sizes(self) -> Sizes:
        """Sizes of generated tasks."""
        return Sizes(self.min_grid_size, self.max_grid_size, self.demonstrations)

    formats = ("documents", "chats", "answers")

    def open(self, data_format: DataFormat, context: SourceContext) -> DataSource:
        """Find the files of tasks, or generate tasks while they are read."""
        fails_on_bad_line = self.on_bad_line == "fail"
        if self.path is None:
            stream = limit_documents(lambda: self._documents(self._generate()), self.limit)
            return DataSource(
                "arc", self, to_plain(self), stream, fails_on_bad_line=fails_on_bad_line
            )
        paths, solutions = open_tasks(
            self.path, self.solutions, (f"{context.key}.path", f"{context.key}.solutions")
        )
        return DataSource(
            name=source_name(files.expand_path(self.path)),
            config=self,
            fingerprint=[to_plain(self), *map(file_stamp, paths), solutions],
            train=limit_documents(
                lambda: self._documents(read_tasks(paths, solutions)), self.limit
            ),
            path=self.path,
            fails_on_bad_line=fails_on_bad_line,
        )

    def _generate(self) -> Iterator["ArcTask"]:
        rules = self.rules or TRAIN_RULES
        for index, puzzle in enumerate(generate_puzzles(rules, self.seed, self.count, self.sizes)):
            yield ArcTask((puzzle,), "arc", index)

    def _documents(self, tasks: Iterable["ArcTask | Reject"]) -> Iterator[Document | Reject]:
        """Yield every view of every test input of the tasks. A task is split as a whole."""
        for task in tasks:
            if isinstance(task, Reject):
                yield task
                continue
            for puzzle in task.puzzles:
                for view in range(self.views):
                    seed = f"{self.seed}/{puzzle.name}/{puzzle.test_index}/{view}"
                    augmented = augment(
                        puzzle,
                        random.Random(seed),
                        symmetries=self.symmetries,
                        colours=self.colours,
                        shuffle_demonstrations=self.shuffle_demonstrations,
                    )
                    example = ArcExample(augmented, self.loss == "all_outputs")
                    key = repr(puzzle.demonstrations).encode()
                    yield Document(example, key, task.file, task.line)


class ArcTask(NamedTuple):
    """A puzzle for every test input, and where it was read."""

    puzzles: tuple[Puzzle, ...]
    file: str
    line: int


def find_task_files(path: str, key: str = "data.path") -> list[Path]:
    """The files of tasks that `path` stands for; UserError, naming `key`, where there are none."""
    start = files.expand_path(path)
    if start.is_dir():
        below = (each for each in start.rglob("*") if not each.name.startswith("."))
        found = sorted(each for each in below if each.name.endswith(SUFFIXES))
        if not found:
            raise UserError(f"{key}: no {', '.join(SUFFIXES)} file in the folder {start}")
        return found
    if not start.is_file():
        there = [each.name for each in start.parent.iterdir()] if start.parent.is_dir() else []
        raise UserError(f"{key}: {start} does not exist{did_you_mean(start.name, there)}")
    if not start.name.endswith(SUFFIXES):
        raise UserError(f"{key}: {start} is not of a known kind; use {', '.join(SUFFIXES)}")
    return [start]


def read_solutions(path: str, key: str = "data.solutions") -> Solutions:
    """Outputs of tests by the ids of tasks; UserError where the file is something else."""
    (file, *more) = find_task_files(path, key)
    found = _parsed(file)
    lists = isinstance(found, dict) and all(isinstance(each, list) for each in found.values())
    if more or not lists or {"train", "test"} & found.keys():
        raise UserError(f"{key}: {file} is no file of solutions: {{id: [output, ...]}}")
    return found


def open_tasks(
    path: str, solutions: str | None, keys: tuple[str, str] = ("data.path", "data.solutions")
) -> tuple[list[Path], Solutions]:
    """The files of tasks, the one of solutions not among them, and the solutions."""
    found = find_task_files(path, keys[0])
    if solutions is None:
        return found, {}
    aside = files.expand_path(solutions).resolve()
    return [each for each in found if each.resolve() != aside], read_solutions(solutions, keys[1])


def read_tasks(paths: list[Path], solutions: Solutions) -> Iterator[ArcTask | Reject]:
    """The tasks of files; a Reject, with file and number of line or task, for each that is none.
    Of several tasks of one name the second is `name#2`.
    """
    reported: Counter[str] = Counter()
    for path in paths:
        for name, record, line in _records(path):
            if isinstance(record, Reject):
                yield record
                continue
            reported[name] += 1
            own = name if reported[name] == 1 else f"{name}#{reported[name]}"
            try:
                yield ArcTask(read_task(record, own, solutions.get(name, [])), str(path), line)
            except ValueError as error:
                yield Reject(str(path), line, f"task {name}: {error}")


def read_task(record: Any, name: str, solutions: list[Any]) -> tuple[Puzzle, ...]:
    """The puzzles of one task. ValueError says what is wrong with it."""
    if not isinstance(record, dict) or not {"train", "test"} <= record.keys():
        raise ValueError("not a task: it needs `train` and `test`")
    for part in ("train", "test"):
        pairs = record[part]
        if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
            raise ValueError(f"`{part}` is not a list of pairs")
        if not pairs:
            raise ValueError("no demonstrations" if part == "train" else "no test input")
    shown = tuple(
        Pair(*(_grid(pair.get(side), f"demonstration {n}, {side}") for side in Pair._fields))
        for n, pair in enumerate(record["train"], 1)
    )
    return tuple(
        Puzzle(
            *(name, place, shown, _grid(test.get("input"), f"test {place + 1}, input")),
            _answer(test, place, solutions),
        )
        for place, test in enumerate(record["test"])
    )


def _answer(test: dict[str, Any], place: int, solutions: list[Any]) -> Grid:
    given = test.get("output")
    if given is None and place < len(solutions):
        given = solutions[place]
    if given is None:
        raise ValueError(f"test {place + 1} has no output, and there is no solution for it")
    return _grid(given, f"test {place + 1}, output")


def _grid(value: Any, where: str) -> Grid:
    if not isinstance(value, list) or not value or not all(isinstance(row, list) for row in value):
        raise ValueError(f"{where}: no grid, which is a list of rows of colours")
    widths = {len(row) for row in value}
    if len(widths) > 1:
        raise ValueError(f"{where}: ragged, with rows of {' and '.join(map(str, sorted(widths)))}")
    width = widths.pop()
    if not 0 < width <= MAX_GRID_SIZE or len(value) > MAX_GRID_SIZE:
        size = f"{len(value)} x {width}"
        raise ValueError(f"{where}: {size}; a grid has 1 to {MAX_GRID_SIZE} rows and columns")
    for cell in (cell for row in value for cell in row):
        if type(cell) is not int or not 0 <= cell < NUM_COLOURS:
            raise ValueError(f"{where}: {cell!r} is no colour from 0 to {NUM_COLOURS - 1}")
    return tuple(map(tuple, value))


def _records(path: Path) -> Iterator[tuple[str, Any, int]]:
    """Name, content and number of each task of a file, from 1."""
    if not path.name.endswith(".json"):
        for row in files.read_records(path):
            line = row.line
            name = "" if isinstance(row, Reject) else str(row.data.get("id", f"line {line}"))
            yield name, row if isinstance(row, Reject) else row.data, line
        return
    try:
        found = _parsed(path)
    except UserError as error:
        yield path.stem, Reject(str(path), 1, str(error).removeprefix(f"{path}: ")), 1
        return
    many = isinstance(found, dict) and found and not {"train", "test"} & found.keys()
    many = many and any(isinstance(each, dict) for each in found.values())
    for number, (name, record) in enumerate(found.items() if many else [(path.stem, found)], 1):
        yield name, record, number


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON") from None

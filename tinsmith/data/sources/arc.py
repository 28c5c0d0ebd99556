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
    """A task: one puzzle per test input, with the file and line it came from."""

    puzzles: tuple[Puzzle, ...]
    file: str
    line: int


def find_task_files(path: str, key: str = "data.path") -> list[Path]:
    """Return `path` itself, or all task files in a folder and its subfolders, sorted.

    Raise UserError if there is none. `key` is the recipe key that the message names.
    """
    root = files.expand_path(path)
    if root.is_dir():
        visible = (file for file in root.rglob("*") if not file.name.startswith("."))
        paths = sorted(file for file in visible if file.name.endswith(SUFFIXES))
        if not paths:
            raise UserError(f"{key}: no {', '.join(SUFFIXES)} file in the folder {root}")
        return paths
    if not root.is_file():
        names = [file.name for file in root.parent.iterdir()] if root.parent.is_dir() else []
        raise UserError(f"{key}: {root} does not exist{did_you_mean(root.name, names)}")
    if not root.name.endswith(SUFFIXES):
        raise UserError(f"{key}: {root} is not of a known kind; use {', '.join(SUFFIXES)}")
    return [root]


def read_solutions(path: str, key: str = "data.solutions") -> Solutions:
    """Read the test outputs by task id. Raise UserError if the file has another structure."""
    (file, *more) = find_task_files(path, key)
    content = _read_json(file)
    has_lists = isinstance(content, dict) and all(isinstance(v, list) for v in content.values())
    if more or not has_lists or {"train", "test"} & content.keys():
        raise UserError(f"{key}: {file} is no file of solutions: {{id: [output, ...]}}")
    return content


def open_tasks(
    path: str, solutions: str | None, keys: tuple[str, str] = ("data.path", "data.solutions")
) -> tuple[list[Path], Solutions]:
    """Return the task files, without the solutions file, and the solutions."""
    paths = find_task_files(path, keys[0])
    if solutions is None:
        return paths, {}
    solutions_path = files.expand_path(solutions).resolve()
    task_paths = [file for file in paths if file.resolve() != solutions_path]
    return task_paths, read_solutions(solutions, keys[1])


def read_tasks(paths: list[Path], solutions: Solutions) -> Iterator[ArcTask | Reject]:
    """Yield the tasks of files, and a Reject for every invalid one, with its line or its index in
    the file. The second task with the same name is called `name#2`.
    """
    name_counts: Counter[str] = Counter()
    for path in paths:
        for name, record, line in _read_raw_tasks(path):
            if isinstance(record, Reject):
                yield record
                continue
            name_counts[name] += 1
            unique = name if name_counts[name] == 1 else f"{name}#{name_counts[name]}"
            try:
                yield ArcTask(read_task(record, unique, solutions.get(name, [])), str(path), line)
            except ValueError as error:
                yield Reject(str(path), line, f"task {name}: {error}")


def read_task(record: Any, name: str, solutions: list[Any]) -> tuple[Puzzle, ...]:
    """Return the puzzles of one task. Raise ValueError, with the reason, if it is invalid."""
    if not isinstance(record, dict) or not {"train", "test"} <= record.keys():
        raise ValueError("not a task: it needs `train` and `test`")
    for part in ("train", "test"):
        pairs = record[part]
        if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
            raise ValueError(f"`{part}` is not a list of pairs")
        if not pairs:
            raise ValueError("no demonstrations" if part == "train" else "no test input")
    demonstrations = tuple(
        Pair(*(_parse_grid(pair.get(side), f"demonstration {n}, {side}") for side in Pair._fields))
        for n, pair in enumerate(record["train"], 1)
    )
    return tuple(
        Puzzle(
            name,
            test_index,
            demonstrations,
            _parse_grid(test.get("input"), f"test {test_index + 1}, input"),
            _parse_answer(test, test_index, solutions),
        )
        for test_index, test in enumerate(record["test"])
    )


def _parse_answer(test: dict[str, Any], test_index: int, solutions: list[Any]) -> Grid:
    """Return the output of a test input, from the task or else from the solutions."""
    output = test.get("output")
    if output is None and test_index < len(solutions):
        output = solutions[test_index]
    if output is None:
        raise ValueError(f"test {test_index + 1} has no output, and there is no solution for it")
    return _parse_grid(output, f"test {test_index + 1}, output")


def _parse_grid(value: Any, label: str) -> Grid:
    """Return a JSON value as a grid. Raise ValueError, which starts with `label`, if it is none."""
    if not isinstance(value, list) or not value or not all(isinstance(row, list) for row in value):
        raise ValueError(f"{label}: not a grid (a list of rows of colours)")
    widths = {len(row) for row in value}
    if len(widths) > 1:
        raise ValueError(f"{label}: ragged, with rows of {' and '.join(map(str, sorted(widths)))}")
    width = widths.pop()
    if not 0 < width <= MAX_GRID_SIZE or len(value) > MAX_GRID_SIZE:
        size = f"{len(value)} x {width}"
        raise ValueError(f"{label}: {size}; a grid has 1 to {MAX_GRID_SIZE} rows and columns")
    for cell in (cell for row in value for cell in row):
        if type(cell) is not int or not 0 <= cell < NUM_COLOURS:
            raise ValueError(f"{label}: {cell!r} is no colour from 0 to {NUM_COLOURS - 1}")
    return tuple(map(tuple, value))


def _read_raw_tasks(path: Path) -> Iterator[tuple[str, Any, int]]:
    """Yield name, JSON value and number (line, or index from 1) of each task of a file."""
    if not path.name.endswith(".json"):
        for row in files.read_records(path):
            line = row.line
            name = "" if isinstance(row, Reject) else str(row.data.get("id", f"line {line}"))
            yield name, row if isinstance(row, Reject) else row.data, line
        return
    try:
        content = _read_json(path)
    except UserError as error:
        yield path.stem, Reject(str(path), 1, str(error).removeprefix(f"{path}: ")), 1
        return
    has_many = isinstance(content, dict) and content and not {"train", "test"} & content.keys()
    has_many = has_many and any(isinstance(value, dict) for value in content.values())
    tasks = content.items() if has_many else [(path.stem, content)]
    for number, (name, record) in enumerate(tasks, 1):
        yield name, record, number


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON") from None

"""The `data:` section of a recipe: one of these, or a list of them, each with its `weight`."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tinsmith.core.parse import Config, Count, Kind, did_you_mean
from tinsmith.data.arc.generators import TRAIN_RULES, Sizes

DataFormat = Literal["documents", "chats", "answers", "pairs", "prompts"]
"""What an objective reads: pretraining wants documents, fine-tuning wants chats, alignment with its
own excursions wants chats one to a row, preferences want pairs of answers to one prompt, and
reinforcement wants prompts with an answer to check."""

OnBadLine = Literal["reject", "fail"]
TaskName = Literal["arithmetic", "sort", "copy", "calculator"]


@dataclass(frozen=True, kw_only=True)
class DataSection(Config):
    """What every kind of data has in common."""

    kind: str
    weight: float = 1.0
    """The share of training rows, relative to the other sources of the list."""
    validation: float | str = 0.05
    """The fraction of documents held back for validation; for text and chats, or else a path."""
    limit: Count | None = None
    """Take at most this many documents or chats."""

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight={self.weight} must be above 0")
        if not isinstance(self.validation, str) and not 0 <= self.validation <= 0.5:
            raise ValueError(f"validation={self.validation} must be a fraction from 0 to 0.5")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class StdlibData(DataSection):
    """Python's own standard library: modules as documents, or (instruction, function) pairs as
    chats."""

    kind: Literal["stdlib"] = "stdlib"
    validation: float = 0.05


@dataclass(frozen=True, kw_only=True)
class TasksData(DataSection):
    """Generated tasks with an answer that can be checked; `digits` and `length` set how hard they
    are."""

    kind: Literal["tasks"] = "tasks"
    validation: float = 0.05
    tasks: tuple[Literal["arithmetic", "sort", "copy", "calculator"], ...] = (
        "arithmetic",
        "sort",
        "copy",
    )
    count: Count = 20_000
    seed: int = 0
    digits: int = 3
    """Digits of a number, at most."""
    length: int = 8
    """Numbers to sort or letters to copy, at most."""
    answer_tags: bool = False
    """Whether chats say the answer inside `<answer>`."""
    reasoning: bool = True
    """Whether the assistant of a chat or pair works the task out before it answers."""
    error_rate: float = 0.0
    """The share of chats with a wrong answer (a number one too high, the calculator not asked): a
    careless teacher, whose pupil has something to learn from preferences and rewards."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise ValueError("tasks must name at least one of arithmetic, sort, copy, calculator")
        if not 0 <= self.error_rate <= 1:
            raise ValueError(f"error_rate={self.error_rate} must be a share from 0 to 1")
        for name, value, highest in (
            ("count", self.count, 10**9),
            ("digits", self.digits, 9),
            ("length", self.length, 99),
        ):
            if not 1 <= value <= highest:
                raise ValueError(f"{name}={value} must be from 1 to {highest}")


@dataclass(frozen=True, kw_only=True)
class TextData(DataSection):
    """Your own text: .txt, .jsonl, .jsonl.gz or .parquet, or a folder of them."""

    kind: Literal["text"] = "text"
    path: str
    field: str = "text"
    """Which field of a row is the text."""
    on_bad_line: OnBadLine = "reject"


@dataclass(frozen=True, kw_only=True)
class ChatsData(DataSection):
    """Your own chats: .jsonl, .jsonl.gz or .parquet, or a folder of them. An objective that reads
    pairs or prompts finds them in the same rows."""

    kind: Literal["chats"] = "chats"
    path: str
    on_bad_line: OnBadLine = "reject"


@dataclass(frozen=True, kw_only=True)
class HubData(DataSection):
    """A data set of the Hugging Face Hub, by name; or a local folder that `datasets` can read."""

    kind: Literal["hub"] = "hub"
    validation: float = 0.05
    name: str
    config: str | None = None
    split: str = "train"
    field: str | None = "text"
    """Which field of a row is a document; null renders the row's chat instead. Fine-tuning
    always reads chats, as preferences do pairs and reinforcement prompts."""
    revision: str | None = None
    on_bad_line: OnBadLine = "reject"


@dataclass(frozen=True, kw_only=True)
class ArcData(DataSection):
    """Puzzles of grids: your own in ARC-AGI's JSON format, or generated ones."""

    kind: Literal["arc"] = "arc"
    validation: float = 0.05
    path: str | None = None
    """A file of one task or of many, or a folder of them; null generates tasks."""
    solutions: str | None = None
    """A file with the outputs of tests, where the tasks lack them."""
    on_bad_line: OnBadLine = "reject"
    loss: Literal["test_only", "all_outputs"] = "all_outputs"
    """Which outputs are learned: the test's, or those of the demonstrations too."""
    views: Count = 1
    """How many times a task is taken, each time in a view of its own."""
    symmetries: bool = True
    """Whether a view turns and mirrors."""
    colours: Literal["all", "keep_0", "none"] = "keep_0"
    """Which colours a view exchanges."""
    shuffle_demonstrations: bool = True
    """Whether a view shuffles the demonstrations."""
    seed: int = 0
    rules: tuple[str, ...] = ()
    """Names of generated rules, of `arc.generators.TRAIN_RULES`. Empty means all of them."""
    count: Count = 10_000
    """How many tasks are generated."""
    min_grid_size: int = 3
    max_grid_size: int = 6
    """Rows and columns of a generated input."""
    demonstrations: int = 3
    """Of a generated task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solutions is not None and self.path is None:
            raise ValueError("solutions are of tasks at a path; name it with data.path")
        for name in self.rules:
            if name not in TRAIN_RULES:
                raise ValueError(
                    f"rules: '{name}' is none to train on{did_you_mean(name, list(TRAIN_RULES))}"
                )
        for name, lowest, highest in (
            *(("views", 1, 10**6), ("count", 1, 10**9), ("min_grid_size", 3, self.max_grid_size)),
            *(("max_grid_size", 3, 10), ("demonstrations", 1, 10)),
        ):
            if not lowest <= (value := getattr(self, name)) <= highest:
                raise ValueError(f"{name}={value} must be from {lowest} to {highest}")

    @property
    def sizes(self) -> Sizes:
        """Of generated tasks."""
        return Sizes(self.min_grid_size, self.max_grid_size, self.demonstrations)


DataConfig = Annotated[StdlibData | TasksData | ArcData | TextData | ChatsData | HubData, Kind()]

"""The `rewards:` list of a recipe: what answers are judged by, each with its weight."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from tinsmith.core.parse import Config, Count, Kind
from tinsmith.objectives.classifier import Classifier
from tinsmith.objectives.rewards import (
    Panel,
    Reward,
    Rule,
    each,
    exact_answer,
    sized,
    think_format,
    unit_tests,
    variety,
)
from tinsmith.objectives.score import Scorer


@dataclass(frozen=True, kw_only=True)
class Judging(Config):
    """What every reward has: its name, and its weight in the sum."""

    kind: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"weight={self.weight} must be finite")

    def rule(self, models: Mapping[str, Scorer]) -> Rule:
        """The reward with its weight; `models` are the trained reward models by their folders."""
        return Rule(self.kind, self.panel(models), self.weight)

    def panel(self, models: Mapping[str, Scorer]) -> Panel:
        """What judges many answers: here, `build()` one after the other."""
        return each(self.build())

    def build(self) -> Reward:
        """The function of a prompt and an answer's text."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Exact(Judging):
    """1 where the answer is right."""

    kind: Literal["exact"] = "exact"

    def build(self) -> Reward:
        """Needs data with answers."""
        return exact_answer


@dataclass(frozen=True, kw_only=True)
class Format(Judging):
    """1 for one `<think>` span and then one `<answer>` span."""

    kind: Literal["format"] = "format"

    def build(self) -> Reward:
        """Partly right is 1/8 for each mark."""
        return think_format


@dataclass(frozen=True, kw_only=True)
class Length(Judging):
    """1 from `low` to `high` characters."""

    kind: Literal["length"] = "length"
    low: Count = 20
    high: Count = 800

    def __post_init__(self) -> None:
        super().__post_init__()
        sized(self.low, self.high)

    def build(self) -> Reward:
        """Falls to 0 at none, and at twice `high`."""
        return sized(self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class Variety(Judging):
    """1 where no three words in a row come twice."""

    kind: Literal["variety"] = "variety"

    def build(self) -> Reward:
        """The share of them that are different."""
        return variety


@dataclass(frozen=True, kw_only=True)
class UnitTests(Judging):
    """1 where the answer's program passes the tests of its row, in the sandbox."""

    kind: Literal["tests"] = "tests"

    def build(self) -> Reward:
        """Needs data with tests."""
        return unit_tests


@dataclass(frozen=True, kw_only=True)
class Classified(Judging):
    """What a Hugging Face sequence classifier in the folder `path` says."""

    kind: Literal["classifier"] = "classifier"
    path: str

    def panel(self, models: Mapping[str, Scorer]) -> Panel:
        """Reads the folder."""
        return Classifier(self.path)


@dataclass(frozen=True, kw_only=True)
class Learned(Judging):
    """What a reward model says, a run of `objective: {kind: reward}` in the folder `path`. It reads
    ids, so its tokenizer must be that of the run.
    """

    kind: Literal["model"] = "model"
    path: str

    def panel(self, models: Mapping[str, Scorer]) -> Panel:
        """Its score of the whole conversation."""
        model = models[self.path]
        return lambda answers: model.score([answer.ids for answer in answers]).tolist()


RewardConfig = Annotated[
    Exact | Format | Length | Variety | UnitTests | Classified | Learned, Kind()
]

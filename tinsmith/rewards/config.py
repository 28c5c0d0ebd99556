"""The `rewards:` list of a recipe: what answers are judged by, each with its weight."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from tinsmith.core.parse import Config, Count, Kind
from tinsmith.rewards.classifier import Classifier
from tinsmith.rewards.functions import (
    BatchReward,
    RewardFunc,
    WeightedReward,
    as_batch_reward,
    distinct_ngrams,
    exact_match,
    make_length_reward,
    think_format,
    unit_tests,
)
from tinsmith.rewards.model import RewardModel


@dataclass(frozen=True, kw_only=True)
class RewardBase(Config):
    """What every reward has: its name, and its weight in the sum."""

    kind: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"weight={self.weight} must be finite")

    def build_weighted(self, models: Mapping[str, RewardModel]) -> WeightedReward:
        """The reward with its weight; `models` are the trained reward models by their folders."""
        return WeightedReward(self.kind, self.build_batch(models), self.weight)

    def build_batch(self, models: Mapping[str, RewardModel]) -> BatchReward:
        """What judges many answers: here, `build()` one after the other."""
        return as_batch_reward(self.build())

    def build(self) -> RewardFunc:
        """The function of a prompt and an answer's text."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ExactMatchReward(RewardBase):
    """1 where the answer is right."""

    kind: Literal["exact_match"] = "exact_match"

    def build(self) -> RewardFunc:
        """Needs data with answers."""
        return exact_match


@dataclass(frozen=True, kw_only=True)
class FormatReward(RewardBase):
    """1 for one `<think>` span and then one `<answer>` span."""

    kind: Literal["format"] = "format"

    def build(self) -> RewardFunc:
        """Partly right is 1/8 for each mark."""
        return think_format


@dataclass(frozen=True, kw_only=True)
class LengthReward(RewardBase):
    """1 from `low` to `high` characters."""

    kind: Literal["length"] = "length"
    low: Count = 20
    high: Count = 800

    def __post_init__(self) -> None:
        super().__post_init__()
        make_length_reward(self.low, self.high)

    def build(self) -> RewardFunc:
        """Falls to 0 at none, and at twice `high`."""
        return make_length_reward(self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class DistinctNgramsReward(RewardBase):
    """1 where no three words in a row come twice."""

    kind: Literal["distinct_ngrams"] = "distinct_ngrams"

    def build(self) -> RewardFunc:
        """The share of them that are different."""
        return distinct_ngrams


@dataclass(frozen=True, kw_only=True)
class UnitTestsReward(RewardBase):
    """1 where the answer's program passes the tests of its row, in the sandbox."""

    kind: Literal["unit_tests"] = "unit_tests"

    def build(self) -> RewardFunc:
        """Needs data with tests."""
        return unit_tests


@dataclass(frozen=True, kw_only=True)
class ClassifierReward(RewardBase):
    """What a Hugging Face sequence classifier in the folder `path` says."""

    kind: Literal["classifier"] = "classifier"
    path: str

    def build_batch(self, models: Mapping[str, RewardModel]) -> BatchReward:
        """Reads the folder."""
        return Classifier(self.path)


@dataclass(frozen=True, kw_only=True)
class RewardModelReward(RewardBase):
    """What a reward model says, a run of `objective: {kind: reward}` in the folder `path`. It reads
    ids, so its tokenizer must be that of the run.
    """

    kind: Literal["reward_model"] = "reward_model"
    path: str

    def build_batch(self, models: Mapping[str, RewardModel]) -> BatchReward:
        """Its score of the whole conversation."""
        model = models[self.path]
        return lambda answers: model.score([answer.ids for answer in answers]).tolist()


RewardConfig = Annotated[
    ExactMatchReward
    | FormatReward
    | LengthReward
    | DistinctNgramsReward
    | UnitTestsReward
    | ClassifierReward
    | RewardModelReward,
    Kind(),
]

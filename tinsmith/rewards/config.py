"""Config of the `rewards:` list of a recipe: reward functions and models with weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from tinsmith.core.parse import Config, Count, Kind
from tinsmith.data.formats.prompts import Prompt
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
    """Base of all rewards: a name and a weight in the sum."""

    kind: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"weight={self.weight} must be finite")

    def can_score(self, prompt: Prompt) -> bool:
        """Return False if no completion of the prompt could get this reward."""
        return True

    def build_weighted(self, models: Mapping[str, RewardModel]) -> WeightedReward:
        """Build the reward with its weight; `models` are the trained reward models by folder."""
        return WeightedReward(self.kind, self.build_batch(models), self.weight)

    def build_batch(self, models: Mapping[str, RewardModel]) -> BatchReward:
        """Build the function that scores many completions; by default it calls `build()`
        for each.
        """
        return as_batch_reward(self.build())

    def build(self) -> RewardFunc:
        """Build the function of a prompt and the text of a completion."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ExactMatchReward(RewardBase):
    """1 if the completion's answer equals the prompt's answer, else 0."""

    kind: Literal["exact_match"] = "exact_match"

    def can_score(self, prompt: Prompt) -> bool:
        """Return True if the prompt has an answer."""
        return prompt.answer is not None

    def build(self) -> RewardFunc:
        """Return the reward function, which needs prompts with an answer."""
        return exact_match


@dataclass(frozen=True, kw_only=True)
class FormatReward(RewardBase):
    """1 for one `<think>` span followed by one `<answer>` span."""

    kind: Literal["format"] = "format"

    def build(self) -> RewardFunc:
        """Return the reward function, which gives 1/8 for each tag that occurs exactly once."""
        return think_format


@dataclass(frozen=True, kw_only=True)
class LengthReward(RewardBase):
    """1 for completions of `low` to `high` characters."""

    kind: Literal["length"] = "length"
    low: Count = 20
    high: Count = 800

    def __post_init__(self) -> None:
        super().__post_init__()
        make_length_reward(self.low, self.high)

    def build(self) -> RewardFunc:
        """Return the reward function, which falls to 0 at no characters and at twice `high`."""
        return make_length_reward(self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class DistinctNgramsReward(RewardBase):
    """1 if no sequence of three words occurs twice."""

    kind: Literal["distinct_ngrams"] = "distinct_ngrams"

    def build(self) -> RewardFunc:
        """Return the reward function: the fraction of distinct sequences of three words."""
        return distinct_ngrams


@dataclass(frozen=True, kw_only=True)
class UnitTestsReward(RewardBase):
    """1 if the completion's program passes the unit tests of its prompt in the sandbox."""

    kind: Literal["unit_tests"] = "unit_tests"

    def build(self) -> RewardFunc:
        """Return the reward function, which needs prompts with tests."""
        return unit_tests


@dataclass(frozen=True, kw_only=True)
class ClassifierReward(RewardBase):
    """The score of a Hugging Face sequence classifier in the folder `path`."""

    kind: Literal["classifier"] = "classifier"
    path: str

    def build_batch(self, models: Mapping[str, RewardModel]) -> BatchReward:
        """Load the classifier from its folder."""
        return Classifier(self.path)


@dataclass(frozen=True, kw_only=True)
class RewardModelReward(RewardBase):
    """The score of a reward model, which a run of `objective: {kind: reward}` has trained, at
    `path`.

    It reads token ids, so its tokenizer must be that of the run.
    """

    kind: Literal["reward_model"] = "reward_model"
    path: str

    def build_batch(self, models: Mapping[str, RewardModel]) -> BatchReward:
        """Return a function that scores prompts with their completions by the reward model."""
        model = models[self.path]
        return lambda responses: model.score([response.ids for response in responses]).tolist()


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

"""Small models with random weights, so that completions differ."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tinsmith.data.formats.prompts import Prompt
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.objectives.rl.base import RLConfig
from tinsmith.objectives.rl.rollout import Rollout

VOCAB = 24
END = 1

MIXERS: dict[str, dict[str, Any]] = {
    "gqa": {"kind": "gqa", "heads": 4, "kv_heads": 2},
    "window": {"kind": "gqa", "heads": 4, "window": 5},
    "mla": {
        "kind": "mla",
        "heads": 4,
        "kv_rank": 16,
        "q_rank": 16,
        "nope_dim": 8,
        "rope_dim": 4,
        "v_dim": 8,
    },
    "nsa": {
        "kind": "nsa",
        "heads": 4,
        "kv_heads": 2,
        "compress_block": 4,
        "compress_stride": 2,
        "select_block": 4,
        "select_count": 2,
        "window": 6,
    },
}


def make_small(mixer: str = "gqa", dtype: torch.dtype = torch.float64, **model: Any) -> LM:
    """A model in training mode, with `model` for keys of its section."""
    torch.manual_seed(0)
    layer = {"mixer": MIXERS[mixer], "feed_forward": {"kind": "swiglu", "hidden_dim": 48}}
    section = {"vocab_size": VOCAB, "dim": 32, "depth": 2, "max_seq_len": 128}
    section |= {"tie_embeddings": False, "pattern": [layer]}
    lm = LM(ModelConfig.from_dict(section | model)).to(dtype)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return lm


@pytest.fixture
def small() -> Callable[..., LM]:
    return make_small


class Prompts:
    """Ten prompts in batches of `batch_size` over `world` processes; as much of
    `objectives.base.SampleSource` as an objective with prompts uses.
    """

    def __init__(self, batch_size: int = 4, rank: int = 0, world: int = 1):
        self.batch_size, self.rank_batch_size = batch_size, batch_size // world
        self.offset, self.cursor = rank * self.rank_batch_size, 0

    def next_prompts(self) -> list[Prompt]:
        first = self.cursor + self.offset
        self.cursor += self.batch_size
        numbers = [place % 10 for place in range(first, first + self.rank_batch_size)]
        return [Prompt([5 + n, 6, 7, 8][: 2 + n % 3], n, str(n), {}) for n in numbers]


def liked(prompts: list[Prompt], episodes: list[Rollout]) -> list[float]:
    """The share of even ids in an answer."""
    return [
        sum(i % 2 == 0 for i in each.completion_ids) / len(each.completion_ids) for each in episodes
    ]


TOKENIZER: Any = SimpleNamespace(end_of_text=END, end_of_turn=END, eos_ids=(END,))


def make_ready(config: RLConfig, lm: LM) -> Any:
    """The config's objective for a model, with `liked` for rewards."""
    objective = config.build()
    if config.frozen_models():
        objective.frozen_models = {"reference": copy.deepcopy(lm).eval().requires_grad_(False)}
    objective.prepare(lm, TOKENIZER)
    objective.raw_rewards = liked
    return objective


@pytest.fixture
def ready() -> Callable[..., Any]:
    return make_ready

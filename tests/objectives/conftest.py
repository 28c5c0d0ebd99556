"""Small models whose weights are all stirred, so that answers differ."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tinsmith.nn.model import LM, ModelConfig

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


@pytest.fixture
def small() -> Callable[..., LM]:
    """(name of a mixer, dtype, keys of the model) -> a model in training mode."""

    def made(mixer: str = "gqa", dtype: torch.dtype = torch.float64, **model: Any) -> LM:
        torch.manual_seed(0)
        layer = {"mixer": MIXERS[mixer], "feed_forward": {"kind": "swiglu", "hidden": 48}}
        section = {"vocab_size": VOCAB, "dim": 32, "depth": 2, "max_context": 128}
        section |= {"tie_embeddings": False, "pattern": [layer]}
        lm = LM(ModelConfig.from_dict(section | model)).to(dtype)
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        return lm

    return made

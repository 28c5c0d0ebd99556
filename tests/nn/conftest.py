"""Small models for the tests of this folder."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tinsmith.nn.model import LM, ModelConfig


@pytest.fixture
def section() -> Callable[..., dict[str, Any]]:
    """(options of gqa, keys of the model) -> a `model:` section of width 32 and vocabulary 48."""

    def made(mixer: dict[str, Any] | None = None, **model: Any) -> dict[str, Any]:
        layer = {
            "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2} | (mixer or {}),
            "feed_forward": {"kind": "swiglu", "hidden_dim": 48},
        }
        base = {"vocab_size": 48, "dim": 32, "depth": 3, "max_seq_len": 128, "pattern": [layer]}
        return base | model

    return made


@pytest.fixture
def small(section: Callable[..., dict[str, Any]]) -> Callable[..., LM]:
    """The same arguments -> a float64 model in eval mode, every parameter off its first value."""

    def made(mixer: dict[str, Any] | None = None, **model: Any) -> LM:
        torch.manual_seed(0)
        lm = LM(ModelConfig.from_dict(section(mixer, **model))).double().eval()
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        return lm

    return made


@pytest.fixture
def ids() -> torch.Tensor:
    """(2, 12) tokens."""
    return torch.randint(0, 48, (2, 12), generator=torch.Generator().manual_seed(1))

"""Fixtures shared by the tests of whole training runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tinsmith.nn.moe.cosine_router import CosineRouter


@pytest.fixture
def noisy() -> dict[str, Any]:
    """A `model:` section with dropout and router noise, everything random in training."""
    feed = {"kind": "deepseek_moe", "experts": 4, "top_k": 2, "hidden_dim": 24, "noise": 0.5}
    return {
        **{"vocab_size": 320, "dim": 32, "depth": 2, "max_seq_len": 64},
        "dropout": {"embedding": 0.1, "attention": 0.1, "residual": 0.1},
        "pattern": [
            {"mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2}, "feed_forward": feed},
        ],
    }


@pytest.fixture
def dead_experts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`dead_experts(1, 4)` makes every threshold router built later start with thresholds that no
    token reaches for experts 1 and 4.
    """

    def set_dead(*experts: int) -> None:
        original = CosineRouter.__init__

        def init(self: CosineRouter, *arguments: Any) -> None:
            original(self, *arguments)
            with torch.no_grad():
                self.thresholds[list(experts)] = 2.0

        monkeypatch.setattr(CosineRouter, "__init__", init)

    return set_dead

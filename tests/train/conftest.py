"""What several tests of whole runs want."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tinsmith.nn.moe.cosine_router import CosineRouter


@pytest.fixture
def noisy() -> dict[str, Any]:
    """A `model:` section with everything that is drawn at random in training."""
    feed = {"kind": "deepseek_moe", "experts": 4, "top_k": 2, "hidden_dim": 24, "noise": 0.5}
    return {
        **{"vocab_size": 320, "dim": 32, "depth": 2, "max_seq_len": 64},
        "dropout": {"embedding": 0.1, "attention": 0.1, "residual": 0.1},
        "pattern": [
            {"mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2}, "feed_forward": feed},
        ],
    }


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Gates of thresholds that are made from now on begin with these experts never firing."""

    def these(*experts: int) -> None:
        first = CosineRouter.__init__

        def init(self: CosineRouter, *arguments: Any) -> None:
            first(self, *arguments)
            with torch.no_grad():
                self.thresholds[list(experts)] = 2.0

        monkeypatch.setattr(CosineRouter, "__init__", init)

    return these

"""What several tests of whole runs want."""

from typing import Any

import pytest


@pytest.fixture
def noisy() -> dict[str, Any]:
    """A `model:` section with everything that is drawn at random in training."""
    feed = {"kind": "deepseek_moe", "experts": 4, "top_k": 2, "hidden": 24, "noise": 0.5}
    return {
        **{"vocab_size": 320, "dim": 32, "depth": 2, "max_context": 64},
        "dropout": {"embedding": 0.1, "attention": 0.1, "residual": 0.1},
        "pattern": [
            {"mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2}, "feed_forward": feed},
        ],
    }

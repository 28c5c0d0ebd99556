import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tinsmith.nn.model import LM, ModelConfig

VOCABULARY = 96
GROUPED = {"kind": "gqa", "heads": 4, "kv_heads": 2}


def _model(mixer: dict[str, Any] | None = None, **changes: Any) -> LM:
    """A tiny model in eval mode whose weights are all random, biases (a gate's too) and norms."""
    layer = {
        "mixer": mixer if mixer and "kind" in mixer else GROUPED | (mixer or {}),
        "feed_forward": {"kind": "swiglu", "hidden_dim": 48},
    }
    data = {"vocab_size": VOCABULARY, "dim": 32, "depth": 3, "max_seq_len": 64, "pattern": [layer]}
    return _randomised(LM(ModelConfig.from_dict(data | changes))).eval()


def _randomised(model: torch.nn.Module) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        gates = [(name, held) for name, held in model.named_buffers() if name.endswith("bias")]
        for name, parameter in [*model.named_parameters(), *gates]:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.1 * noise)
    return model


@pytest.fixture
def model() -> Callable[..., LM]:
    return _model


@pytest.fixture
def randomised() -> Callable[[torch.nn.Module], Any]:
    return _randomised


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def tokenizer():
    from tinsmith.text.bpe import train_bpe

    return train_bpe(["def f(x):\n    return x + 1\n", "Once upon a time."] * 9, 300)


@pytest.fixture
def edit() -> Callable[..., None]:
    """Change keys of a folder's config.json; a value of `...` removes the key."""

    def change(folder: Path, **changes: Any) -> None:
        path = folder / "config.json"
        data = json.loads(path.read_text()) | changes
        kept = {key: value for key, value in data.items() if value is not ...}
        path.write_text(json.dumps(kept))

    return change

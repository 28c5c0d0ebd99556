"""Tinsmith: a workshop for small language models.

The public names are loaded on first use, so that `import tinsmith` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from tinsmith.config import RunConfig
    from tinsmith.hub.load import load
    from tinsmith.infer.engine import Engine
    from tinsmith.nn.model import LM, ModelConfig
    from tinsmith.text.tokenizer import Tokenizer
    from tinsmith.train.trainer import train

_HOMES = {
    "load": "tinsmith.hub.load",
    "LM": "tinsmith.nn.model",
    "ModelConfig": "tinsmith.nn.model",
    "Tokenizer": "tinsmith.text.tokenizer",
    "Engine": "tinsmith.infer.engine",
    "RunConfig": "tinsmith.config",
    "train": "tinsmith.train.trainer",
}

__all__ = ["LM", "Engine", "ModelConfig", "RunConfig", "Tokenizer", "__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tinsmith' has no attribute {name!r}")

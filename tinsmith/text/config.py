"""The `tokenizer:` section of a recipe."""

from dataclasses import dataclass
from typing import Literal

from tinsmith.core.parse import Config, Count


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig(Config):
    """Train a byte-level BPE of `vocab_size` ids on a sample of at most `max_bytes` of text."""

    vocab_size: Count = 6400
    max_bytes: Count = 50_000_000


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Config):
    """Choose the tokenizer: `train` one, open one at `path` (a file, a folder or a Hub name), or
    use the fixed `symbols` of grids (`text.grid_vocab`).
    """

    train: TrainTokenizerConfig | None = None
    path: str | None = None
    symbols: Literal["grids"] | None = None

    def __post_init__(self) -> None:
        options = [option for option in (self.train, self.path, self.symbols) if option is not None]
        if len(options) != 1:
            raise ValueError("give exactly one of `tokenizer.train`, `.path` and `.symbols`")

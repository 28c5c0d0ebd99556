"""The `tokenizer:` section of a recipe."""

from dataclasses import dataclass

from tinsmith.core.parse import Config, Count


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig(Config):
    """Train a byte-level BPE of `vocab_size` ids on the first `max_bytes` of the data's text."""

    vocab_size: Count = 6400
    max_bytes: Count = 50_000_000


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Config):
    """Either `train` one, or take the one at `path`: a file, a folder, or a name on the Hub."""

    train: TrainTokenizerConfig | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        if (self.train is None) == (self.path is None):
            raise ValueError("give exactly one of `tokenizer.train` and `tokenizer.path`")

"""What a model is made of: `ModelConfig`, read from the `model:` part of a recipe."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from tinsmith.core.errors import UserError
from tinsmith.core.parse import Config, Size, did_you_mean, parse, to_plain
from tinsmith.core.yamlfile import read_yaml
from tinsmith.nn.attention.rope import Rope
from tinsmith.nn.feedforwards import FeedForwardConfig
from tinsmith.nn.mixers import MixerConfig
from tinsmith.nn.parameters import ALL_PARAMETERS
from tinsmith.nn.residuals import ResidualConfig
from tinsmith.nn.residuals.plain import Plain


@dataclass(frozen=True, kw_only=True)
class Layer(Config):
    """One block: a mixer, then a feed-forward."""

    mixer: MixerConfig
    feed_forward: FeedForwardConfig


@dataclass(frozen=True, kw_only=True)
class Dropout(Config):
    """Probabilities, in training only: after the embedding, on attention weights, on what a
    sub-layer adds.
    """

    embedding: float = 0.0
    attention: float = 0.0
    residual: float = 0.0

    def __post_init__(self) -> None:
        for name in ("embedding", "attention", "residual"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """A language model: `first` layers, then `pattern` tiled, then `last`, `depth` in all."""

    vocab_size: Size
    dim: Size
    depth: Size
    pattern: tuple[Layer, ...]
    first: tuple[Layer, ...] = ()
    last: tuple[Layer, ...] = ()
    max_seq_len: Size = 2048
    tie_embeddings: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    positions: Literal["rope", "learned", "sinusoidal", "none"] = "rope"
    rope: Rope = Rope()
    residual: ResidualConfig = Plain()
    dropout: Dropout = Dropout()
    attention: Literal["sdpa", "naive"] = "sdpa"
    trainable: tuple[str, ...] = ALL_PARAMETERS
    """Which tensors training may change, by names and patterns (`nn.parameters`)."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "depth", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps={self.norm_eps} must be above 0")
        ends = len(self.first) + len(self.last)
        if ends > self.depth:
            raise ValueError(f"depth={self.depth} is less than the {ends} layers of first and last")
        if ends < self.depth and not self.pattern:
            raise ValueError("pattern must hold at least one layer")
        if self.positions == "sinusoidal" and self.dim % 2:
            raise ValueError(f"dim={self.dim} must be even for sinusoidal positions")
        if not self.trainable:
            raise ValueError("trainable must name at least one tensor; '*' is all of them")
        self.residual.check(self.dim)
        shapes: set[tuple[int, int]] = set()
        for layer in self.layers:
            layer.mixer.check(self.dim)
            layer.feed_forward.check(self.dim)
            shapes |= {shape for shape in [layer.mixer.value_residual_shape(self.dim)] if shape}
        if len(shapes) > 1:
            raise ValueError(f"value_residual needs one (kv_heads, head_dim), not {sorted(shapes)}")

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All `depth` layers, in order."""
        middle = self.depth - len(self.first) - len(self.last)
        tiled = tuple(self.pattern[i % len(self.pattern)] for i in range(middle))
        return self.first + tiled + self.last

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "model") -> "ModelConfig":
        """The `model:` part of a recipe, `preset: NAME` included; UserError names a key that
        does not fit.
        """
        return parse(cls, with_preset(data, where), where)

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """A model of the package by name, see `presets()`."""
        return cls.from_dict({"preset": name})

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back."""
        return to_plain(self)


def presets() -> list[str]:
    """The names that `preset:` knows."""
    folder = resources.files("tinsmith.nn") / "presets"
    return sorted(
        Path(str(entry)).stem for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def with_preset(data: Any, where: str = "model") -> Any:
    """`{preset: NAME, key: value}` as one plain section: the preset's keys, overridden by the
    others.
    """
    if not isinstance(data, dict):
        raise UserError(f"{where}: needs keys and values (got {data!r})")
    if "preset" not in data:
        return data
    name, known = str(data["preset"]), presets()
    if name not in known:
        raise UserError(
            f"{where}.preset: '{name}' is not one of {', '.join(known)}{did_you_mean(name, known)}"
        )
    base = read_yaml(Path(str(resources.files("tinsmith.nn") / "presets" / f"{name}.yaml")))
    return base | {key: value for key, value in data.items() if key != "preset"}

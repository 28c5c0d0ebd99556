"""A recipe: one YAML file that says everything about a run, as one frozen tree.

Precedence, last wins: the defaults below, the recipe, `-c more.yaml` (merged deeply), `key=value`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinsmith.core.errors import UserError
from tinsmith.core.parse import Config, json_schema, nearest, parse, plain, read_yaml, write_yaml
from tinsmith.data.config import DataConfig
from tinsmith.nn.config import ModelConfig, with_preset
from tinsmith.nn.lora import LoRA
from tinsmith.objectives import ObjectiveConfig
from tinsmith.optim.config import OptimConfig
from tinsmith.text.config import TokenizerConfig, TrainTokenizerConfig
from tinsmith.train.config import EvalConfig, LogConfig, ParallelConfig, TrainConfig

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Everything about a run."""

    schema: int = SCHEMA
    model: ModelConfig | None = None
    """May be left out where `init_from` brings a model."""
    tokenizer: TokenizerConfig | None = None
    """Without it, that of `init_from`, or one trained to the size of the model's vocabulary."""
    data: tuple[DataConfig, ...]
    """One source, or a list of them with weights."""
    objective: ObjectiveConfig
    lora: LoRA | None = None
    """Train low-rank adapters and leave the model as it is."""
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()
    init_from: str | None = None
    """A run, a checkpoint or a Hugging Face folder to start from."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data must name at least one source")
        if self.init_from is None and self.model is None:
            raise ValueError("model is required where there is no init_from")
        if self.init_from is None and self.model is not None and self.tokenizer is None:
            fitting = TrainTokenizerConfig(vocab_size=self.model.vocab_size)
            object.__setattr__(self, "tokenizer", TokenizerConfig(train=fitting))


def load(
    path: Path, overrides: list[str] | None = None, more: list[Path] | None = None
) -> RunConfig:
    """The recipe at `path`, validated; UserError is one line with file, key and remedy."""
    return from_dict(tree(path, overrides, more), str(path))


def tree(
    path: Path, overrides: list[str] | None = None, more: list[Path] | None = None
) -> dict[str, Any]:
    """The recipe as plain data, with overrides and presets applied, before validation."""
    data = _mapping(read_yaml(path), path)
    for extra in more or []:
        data = merge(data, _mapping(read_yaml(extra), extra))
    for override in overrides or []:
        set_key(data, override)
    return data


def from_dict(data: dict[str, Any], where: str = "") -> RunConfig:
    """Plain data as a RunConfig."""
    data = migrate(dict(data), where)
    if isinstance(data.get("model"), dict):
        data["model"] = with_preset(data["model"], f"{where}: model" if where else "model")
    single = isinstance(data.get("data"), dict)
    if single:
        data["data"] = [data["data"]]
    try:
        return parse(RunConfig, data, where)
    except UserError as error:
        said = str(error).replace("data.0", "data", 1) if single else str(error)
        raise UserError(said) from None


def dump(config: RunConfig) -> str:
    """The whole resolved tree as YAML; `load` reads it back to an equal tree."""
    return write_yaml(plain(config))


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe."""
    return json_schema(RunConfig)


def migrate(data: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Bring a tree of an older schema up to date."""
    version = data.get("schema", SCHEMA)
    if not isinstance(version, int) or version > SCHEMA or version < 1:
        place = f"{where}: " if where else ""
        raise UserError(
            f"{place}schema: {version!r} is unknown here (this Tinsmith reads up to {SCHEMA}); "
            "upgrade it"
        )
    return data | {"schema": SCHEMA}


def merge(base: Any, over: Any) -> Any:
    """`over` on top of `base`, mappings merged deeply, anything else replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {key: merge(base.get(key), value) for key, value in over.items()}
    return over


def set_key(data: dict[str, Any], override: str) -> None:
    """Apply `a.b.0.c=value` in place; the value is read as YAML."""
    import yaml

    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"'{override}': overrides look like train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"'{override}': the value is not valid YAML") from None
    *parents, last = path.split(".")
    here: Any = data
    for key in parents:
        here = _step(here, key, override)
    if isinstance(here, list):
        here[_index(here, last, override)] = value
    elif isinstance(here, dict):
        here[last] = value
    else:
        raise UserError(f"'{override}': '{parents[-1]}' holds a value, not keys")


def _step(here: Any, key: str, override: str) -> Any:
    if isinstance(here, list):
        return here[_index(here, key, override)]
    if not isinstance(here, dict):
        raise UserError(f"'{override}': there is no '{key}' inside a plain value")
    if here.get(key) is None:
        here[key] = {}
    return here[key]


def _index(here: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(here):
        raise UserError(f"'{override}': '{key}' is not an index of a list of {len(here)}")
    return int(key)


def _mapping(data: Any, path: Path) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: a recipe holds keys and values; this file is "
            f"{'empty' if data is None else 'not'}"
        )
    known = list(RunConfig.__dataclass_fields__)
    for key in data:
        if key not in known:
            raise UserError(f"{path}: {key}: unknown key{nearest(str(key), known)}")
    return data

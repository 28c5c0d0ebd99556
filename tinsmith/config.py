"""The recipe of a run: one YAML file, parsed into one tree of frozen dataclasses.

Later sources override earlier ones: defaults, the recipe, `-c more.yaml` (merged deeply),
`key=value`. The key `import` lists Python files with variants of the user's own, relative to the
recipe. It is not part of the tree and is never written to a run: opening a folder never runs code.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinsmith.core.errors import UserError
from tinsmith.core.parse import Config, did_you_mean, json_schema, parse, to_plain, variant_of
from tinsmith.core.plugins import import_variants
from tinsmith.core.yamlfile import parse_yaml, read_yaml, write_yaml
from tinsmith.data.sources import ArcData, DataConfig
from tinsmith.nn.config import ModelConfig, with_preset
from tinsmith.nn.lora import LoRA
from tinsmith.objectives import ObjectiveConfig
from tinsmith.optim.config import OptimConfig
from tinsmith.text.config import TokenizerConfig, TrainTokenizerConfig
from tinsmith.train.config import EvalConfig, LogConfig, ParallelConfig, TrainConfig

SCHEMA = 1
LORA_LR_FACTOR = 10
"""Learning rate of LoRA adapters over that of all weights (Schulman, LoRA Without Regret, 2025)."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """A whole recipe. `tinsmith config schema` prints every key."""

    schema: int = SCHEMA
    model: ModelConfig | None = None
    """Optional with `init_from`, which brings a model."""
    tokenizer: TokenizerConfig | None = None
    """Default: the tokenizer of `init_from`, the fixed symbols for grids, or a BPE trained to the
    model's vocabulary size.
    """
    data: tuple[DataConfig, ...]
    """One data source, or a list of sources with weights."""
    objective: ObjectiveConfig
    lora: LoRA | None = None
    """Train low-rank adapters and freeze the model."""
    optim: OptimConfig = OptimConfig()
    """Defaults for training from scratch; with `init_from` or `lora`, `OptimConfig.for_finetuning`
    at the objective's `finetune_lr`.
    """
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()
    init_from: str | None = None
    """A run, a checkpoint or a Hugging Face folder or name to start from."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data must name at least one source")
        if self.objective.generates and self.parallel.kind == "fsdp":
            raise ValueError(
                "parallel.kind=fsdp: this objective generates completions, for which every process "
                "needs the whole model; use ddp"
            )
        matrices = self.optim.matrices.kind
        if matrices in ("adamw8bit", "adafactor") and self.parallel.kind == "fsdp":
            raise ValueError(
                f"parallel.kind=fsdp: optim.matrices.kind={matrices} does not support sharded "
                "weights; use ddp, or adamw"
            )
        if self.init_from is None and self.model is None:
            raise ValueError("model is required without init_from")
        if self.model is not None and self.model.positions == "learned":
            context, most = self.train.seq_len, self.model.max_seq_len
            if context > most:
                learned = f"model.max_seq_len={most}, learned positions"
                raise ValueError(f"train.seq_len={context} is beyond {learned}")
        if self.init_from is None and self.model is not None and self.tokenizer is None:
            grids = any(isinstance(source, ArcData) for source in self.data)
            trained = TrainTokenizerConfig(vocab_size=self.model.vocab_size)
            fitting = TokenizerConfig(symbols="grids") if grids else TokenizerConfig(train=trained)
            object.__setattr__(self, "tokenizer", fitting)


def load(
    path: Path, overrides: list[str] | None = None, more: list[Path] | None = None
) -> RunConfig:
    """Read and validate the recipe at `path`. Errors are one line with file, key and remedy."""
    return from_dict(load_tree(path, overrides, more), str(path))


def load_tree(
    path: Path, overrides: list[str] | None = None, more: list[Path] | None = None
) -> dict[str, Any]:
    """Read the recipe as plain data with overrides applied, before validation."""
    data = _mapping(read_yaml(path), path)
    for extra in more or []:
        data = merge(data, _mapping(read_yaml(extra), extra))
    for override in overrides or []:
        set_key(data, override)
    for name in _imports(data.pop("import", []), path):
        import_variants(path.parent / name)
    return data


def _imports(value: Any, path: Path) -> list[str]:
    """Validate the `import:` key: Python files with variants, relative to the recipe."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{path}: import: must be a list of Python files, [my_mixer.py]")
    return value


def from_dict(data: dict[str, Any], where: str = "") -> RunConfig:
    """Validate plain data as a RunConfig."""
    data = check_schema(dict(data), where)
    if isinstance(data.get("model"), dict):
        data["model"] = with_preset(data["model"], f"{where}: model" if where else "model")
    if data.get("init_from") is not None or data.get("lora") is not None:
        data = _with_finetuning_defaults(data)
    single = isinstance(data.get("data"), dict)
    if single:
        data["data"] = [data["data"]]
    try:
        return parse(RunConfig, data, where)
    except UserError as error:
        message = str(error).replace("data.0", "data", 1) if single else str(error)
        raise UserError(message) from None


def _with_finetuning_defaults(data: dict[str, Any]) -> dict[str, Any]:
    """Fill the defaults of `optim` for a model that is trained already."""
    objective, given = data.get("objective"), data.get("optim", {})
    kind = objective.get("kind") if isinstance(objective, dict) else None
    variant = variant_of(ObjectiveConfig, kind)
    if variant is None or not isinstance(given, dict):
        return data
    lr = variant.finetune_lr * (1 if data.get("lora") is None else LORA_LR_FACTOR)
    optim = dict(given)
    for key, default in to_plain(OptimConfig.for_finetuning(lr)).items():
        optim[key] = value = given.get(key, default)
        if isinstance(value, dict) and value.get("kind", default["kind"]) == default["kind"]:
            optim[key] = default | value
    return data | {"optim": optim}


def dump(config: RunConfig) -> str:
    """Write the resolved recipe as YAML. `load` reads it back to an equal config."""
    return write_yaml(to_plain(config))


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe."""
    return json_schema(RunConfig)


def check_schema(data: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Raise UserError if the recipe's `schema` number is not supported."""
    version = data.get("schema", SCHEMA)
    if not isinstance(version, int) or version > SCHEMA or version < 1:
        place = f"{where}: " if where else ""
        raise UserError(
            f"{place}schema: {version!r} is not supported (this version reads up to {SCHEMA}); "
            "upgrade Tinsmith"
        )
    return data | {"schema": SCHEMA}


def merge(base: Any, over: Any) -> Any:
    """Merge `over` into `base`: mappings deeply, anything else replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {key: merge(base.get(key), value) for key, value in over.items()}
    return over


def set_key(data: dict[str, Any], override: str) -> None:
    """Apply `a.b.0.c=value` in place. The value is parsed as YAML."""
    path, equals, text = override.partition("=")
    where = f"'{override.splitlines()[0]}'" if override else "''"
    if not equals or not path:
        raise UserError(f"{where}: overrides look like train.steps=100")
    value = parse_yaml(text, where)
    *parents, last = path.split(".")
    here: Any = data
    for key in parents:
        here = _step(here, key, where)
    if isinstance(here, list):
        here[_index(here, last, where)] = value
    elif isinstance(here, dict):
        here[last] = value
    else:
        raise UserError(f"{where}: '{parents[-1]}' holds a value, not keys")


def _step(here: Any, key: str, where: str) -> Any:
    if isinstance(here, list):
        return here[_index(here, key, where)]
    if not isinstance(here, dict):
        raise UserError(f"{where}: there is no '{key}' inside a plain value")
    if here.get(key) is None:
        here[key] = {}
    return here[key]


def _index(here: list[Any], key: str, where: str) -> int:
    if not key.isdigit() or int(key) >= len(here):
        raise UserError(f"{where}: '{key}' is not an index of a list of {len(here)}")
    return int(key)


def _mapping(data: Any, path: Path) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: a recipe holds keys and values; this file is "
            f"{'empty' if data is None else 'not'}"
        )
    known = ["import", *RunConfig.__dataclass_fields__]
    for key in data:
        if key not in known:
            raise UserError(f"{path}: {key}: unknown key{did_you_mean(str(key), known)}")
    return data

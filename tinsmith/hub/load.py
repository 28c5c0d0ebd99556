"""`tinsmith.load`: open a run, a checkpoint, a Hugging Face folder, or a model on the Hub."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tinsmith.core.errors import UserError
from tinsmith.core.jsonfile import read_object
from tinsmith.core.log import print_line, print_warning
from tinsmith.core.manifest import MANIFEST, newest_valid, verify
from tinsmith.core.parse import parse
from tinsmith.core.yamlfile import read_yaml
from tinsmith.hub.families.names import IDENTITY_MAP
from tinsmith.hub.families.rope import with_rope_scaling
from tinsmith.hub.from_hf import config_from_hf
from tinsmith.hub.hf import import_folder, open_tokenizer
from tinsmith.hub.materialize import materialize
from tinsmith.hub.peft.adapters import Adapters, read_adapters
from tinsmith.hub.tensors import find_tensors, read_tensors
from tinsmith.nn import lora
from tinsmith.nn.lora import LoRA
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.text.tokenizer import Tokenizer

REQUIRED_FILES = ("model.safetensors", "config.yaml")
"""Files without which a checkpoint cannot be opened."""

CONFIG_PATTERNS = ("config.json",)
TOKENIZER_PATTERNS = ("*.json", "*.txt", "*.jinja")
MODEL_PATTERNS = ("*.safetensors", *TOKENIZER_PATTERNS)
"""Files of a model that are downloaded from the Hub."""

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


def load(
    path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    rope_scaling: dict[str, Any] | None = None,
) -> tuple[LM, Tokenizer | None]:
    """Load a model and its tokenizer: (lm in eval mode, tokenizer or None if the folder has none).

    `path` is a run (its `final/`, otherwise its newest valid checkpoint), a checkpoint, a Hugging
    Face folder, or, if no such path exists, a name on the Hugging Face Hub. Weights keep the dtype
    of the file unless `dtype` is given (a torch dtype or its name). LoRA adapters of a checkpoint
    are merged. `rope_scaling` extends the context: `{kind: yarn, factor, original_max_seq_len}`, or
    the keys of Hugging Face. UserError if there is no model, or if it is damaged or cannot be
    built.
    """
    torch_dtype = _dtype(dtype)
    torch_device = _device(device)
    folder = locate(path)
    if _is_checkpoint(folder):
        return _open_checkpoint(folder, torch_dtype, torch_device, rope_scaling)
    return import_folder(folder, torch_dtype, torch_device, rope_scaling)


def load_config(path: str | Path) -> ModelConfig:
    """Return the config of the model at `path`, as for `load`; weights are not read."""
    folder = locate(path, CONFIG_PATTERNS)
    if _is_checkpoint(folder):
        return _read_recipe(folder)[0]
    return config_from_hf(read_object(folder / "config.json"), str(folder / "config.json"))


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """Return the tokenizer of the model at `path`, as for `load`, or None if it has none. Weights
    need not be there.
    """
    return open_tokenizer(locate(path, TOKENIZER_PATTERNS))


def locate(path: str | Path, allow_patterns: Sequence[str] = MODEL_PATTERNS) -> Path:
    """Return the folder with the weights that `path` names: a checkpoint or a Hugging Face folder.

    If `path` is a name on the Hub, the files that match `allow_patterns` are downloaded.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return _find_in_run(folder)
    if folder.exists():
        raise UserError(f"{path}: is a file; give the folder that holds the model")
    name = str(path)
    if not _HUB_NAME.fullmatch(name) or ("/" in name and folder.parent.exists()):
        raise UserError(f"{path}: no such folder")
    run = Path(os.environ.get("TINSMITH_RUNS", "runs")) / name
    if run.is_dir():
        raise UserError(f"{path}: no such folder; did you mean {run}?")
    return _download(name, allow_patterns)


def base_model_path(path: str) -> str:
    """Return the name under which transformers opens the model at `path`: the absolute path of the
    Hugging Face folder, also inside a run, or a name on the Hub.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    final = folder / "final"
    return str((final if (final / "config.json").is_file() else folder).resolve())


def _find_in_run(folder: Path) -> Path:
    if (folder / "config.json").is_file() or _is_checkpoint(folder):
        return folder
    if (folder / "final" / "config.json").is_file():
        return folder / "final"
    checkpoint, skipped = newest_valid(folder / "checkpoints", required=REQUIRED_FILES)
    for line in skipped if checkpoint else []:
        print_warning(f"skipped {folder / 'checkpoints'}/{line}")
    if checkpoint:
        return checkpoint
    if skipped:
        raise UserError(f"{folder}: no valid checkpoint; {skipped[0]}")
    raise UserError(
        f"{folder}: not a model; looked for final/ and checkpoints/ (a run), {MANIFEST} (a "
        "checkpoint) and config.json (a Hugging Face folder)"
    )


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a checkpoint; `verify` decides whether it is a valid one."""
    if (folder / "config.json").is_file():
        return False
    return (folder / MANIFEST).exists() or all((folder / name).is_file() for name in REQUIRED_FILES)


def _open_checkpoint(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    rope_scaling: dict[str, Any] | None,
) -> tuple[LM, Tokenizer | None]:
    config, lora_config, _ = _read_recipe(folder)
    config = with_rope_scaling(config, rope_scaling)
    lm = materialize(
        config, find_tensors(folder), IDENTITY_MAP, dtype, device, str(folder), lora_config
    )
    return lm, open_tokenizer(folder)


def _read_recipe(folder: Path) -> tuple[ModelConfig, LoRA | None, str | None]:
    """Return model config, LoRA config and `init_from` of a checkpoint's recipe."""
    reason = verify(folder, hashes=True, required=REQUIRED_FILES)
    if reason is not None:
        raise UserError(f"{folder}: not a valid checkpoint: {reason}")
    where = folder / "config.yaml"
    recipe = read_yaml(where)
    if not isinstance(recipe, dict) or "model" not in recipe:
        raise UserError(f"{where}: has no model section")
    section = recipe.get("lora")
    lora_config = None if section is None else parse(LoRA, section, f"{where}: lora")
    return (
        ModelConfig.from_dict(recipe["model"], f"{where}: model"),
        lora_config,
        recipe.get("init_from"),
    )


def load_adapters(path: str | Path) -> tuple[ModelConfig, Adapters, str | None]:
    """Load the LoRA adapters of a run or a checkpoint: (model config, adapters, base model).

    The base model is the name or path to which the adapters were added. UserError if there are no
    adapters.
    """
    folder = locate(path)
    if (folder / "adapter").is_dir():
        config = config_from_hf(read_object(folder / "config.json"))
        base = read_object(folder / "adapter" / "adapter_config.json")["base_model_name_or_path"]
        return config, read_adapters(folder / "adapter", config), base
    if not _is_checkpoint(folder):
        raise UserError(f"{folder}: has no adapters; only a run with a lora section has")
    config, lora_config, base = _read_recipe(folder)
    if lora_config is None:
        raise UserError(f"{folder}: has no adapters; its recipe has no lora section")
    base = base and base_model_path(base)
    state = read_tensors(find_tensors(folder), None, None)
    return config, Adapters.from_weights(lora_config, lora.split_state_dict(state)[1]), base


def _download(name: str, allow_patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    print_line(f"fetching {name} from the Hugging Face Hub: {', '.join(allow_patterns)}", err=True)
    try:
        folder = snapshot_download(
            name, allow_patterns=list(allow_patterns), ignore_patterns=["*/*", "consolidated*"]
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name}: no such folder here, and the Hugging Face Hub answered: {reason}"
        ) from None
    print_line(f"{name} is at revision {Path(folder).name}", err=True)
    return Path(folder)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    known = _DTYPES | {str(kind).removeprefix("torch."): kind for kind in _DTYPES.values()}
    if dtype not in known:
        raise UserError(f"dtype: '{dtype}' is not one of {', '.join(known)}")
    return known[dtype]


def _device(device: torch.device | str | None) -> torch.device:
    try:
        return torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise UserError(f"device: {str(error).splitlines()[0]}") from None

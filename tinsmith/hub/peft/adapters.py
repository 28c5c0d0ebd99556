"""Adapters as PEFT keeps them: `adapter_config.json` and `adapter_model.safetensors`.

Names are those of the Hugging Face model that `hub.hf` writes, with `base_model.model.` in front.
A linear layer has `NAME.lora_A.weight` (R, I) and `NAME.lora_B.weight` (O, R); where its family
orders rows differently, B's rows are reordered as the weight's are. A stack of experts is one of
PEFT's target parameters: A is (E R, I), B is (O, R E), and of several stacks in one module each but
the last is one `base_layer` deeper than the next. `peft.fused_experts` lists the stacks of stock
families. With Tinsmith's own architecture PEFT must merge the adapters before they have an effect,
because its models read expert weights without calling the module that PEFT wraps.

Legend: E experts, R rank, I and O the last two sides of a weight as it is stored.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinsmith.core.errors import UserError
from tinsmith.core.files import atomic_write
from tinsmith.core.jsonfile import read_object
from tinsmith.hub.families.names import NAME_MAPS
from tinsmith.hub.from_hf import TINSMITH_MODEL_TYPE
from tinsmith.hub.keys import ConfigReader
from tinsmith.hub.peft import fused_experts
from tinsmith.hub.tensors import read_header, read_tensors, save_tensors
from tinsmith.hub.to_hf import config_to_hf
from tinsmith.nn import lora
from tinsmith.nn.lora import LoRA, LoRAWeights
from tinsmith.nn.model import LM, ModelConfig

ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _DEEPER = "base_model.model.", ".base_layer"

_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(("fan_in_fan_out", "use_dora", "lora_bias", "use_qalora"), (False,)),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "layer_replication"), ([],)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), ({},)),
    **dict.fromkeys(("velora_config", "kasa_config", "arrow_config", "monteclora_config"), ()),
    **dict.fromkeys(("alora_invocation_tokens", "use_bdlora"), ()),
}
"""Keys that would change what is computed, and the values that do not; null never does."""


class Adapters(NamedTuple):
    """What a folder of adapters holds."""

    config: LoRA
    pairs: dict[str, LoRAWeights]
    """By Tinsmith's names of the weights."""


def write_adapters(
    folder: Path, model_config: ModelConfig, adapters: Adapters, base_model: str | None
) -> None:
    """Write the two files into `folder`, which is made where it is not there; `base` names the
    model that they are for.

    UserError where a weight has no counterpart in the Hugging Face family that `model` is written
    as, so that an adapter cannot have one.
    """
    family, shapes = config_to_hf(model_config).family, _shapes(model_config)
    config, pairs = adapters.config, adapters.pairs
    assert pairs.keys() <= shapes.keys(), "adapters of another model"
    if family in fused_experts.FAMILIES:
        config, pairs = fused_experts.fuse_adapters(config, pairs, shapes)
        shapes = fused_experts.fused_shapes(shapes)
    names = [name for name in shapes if name in pairs]
    tensors: dict[str, Tensor] = {}
    targets: dict[int, list[str]] = {2: [], 3: []}
    for name, module in _places(family, names).items():
        A, B = pairs[name]
        targets[A.dim()].append(module if A.dim() == 2 else _theirs(family, name))
        if A.dim() == 2:
            B = NAME_MAPS[family].to_hf_tensor(name, B, model_config)
        else:
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        tensors |= dict(zip(_leaves(module), (A, B), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / ADAPTER_WEIGHTS_FILE, tensors)
    data = _described(config, base_model) | {
        "target_modules": targets[2],
        "target_parameters": targets[3] or None,
    }
    atomic_write(folder / ADAPTER_CONFIG_FILE, json.dumps(data, indent=2) + "\n")


def _described(config: LoRA, base: str | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def read_adapters(folder: Path, model_config: ModelConfig) -> Adapters:
    """The adapters in a folder that PEFT, or `write_adapters`, has written for `model`.

    Strict: every tensor of the file must belong to a weight of the model. UserError names the
    first key or tensor that does not, and what PEFT can do and Tinsmith cannot (DoRA, other ranks
    for some layers, layers trained whole).
    """
    where = folder / ADAPTER_CONFIG_FILE
    keys = ConfigReader(read_object(where), str(where))
    for key, allowed in _ONLY.items():
        keys.check_allowed(key, allowed)
    family = config_to_hf(model_config).family
    shapes = _shapes(model_config)
    if family in fused_experts.FAMILIES:
        shapes = fused_experts.fused_shapes(shapes)
    stored = read_header(_weights(folder))
    names = _adapted(folder, keys, family, shapes, list(stored))
    tensors = read_tensors(stored, None, None)
    rank = keys.positive_int("r", 8)
    pairs: dict[str, LoRAWeights] = {}
    for name, module in _places(family, names).items():
        A, B = (_taken(tensors, leaf, folder) for leaf in _leaves(module))
        pair = _paired(name, A, B, shapes[name], rank, f"{folder / ADAPTER_WEIGHTS_FILE}: {module}")
        if len(shapes[name]) == 2:
            pair = pair._replace(B=NAME_MAPS[family].from_hf_tensor(name, pair.B, model_config))
        pairs[name] = pair
    for name in tensors:
        raise UserError(
            f"{folder / ADAPTER_WEIGHTS_FILE}: {name} is of no weight that is adapted here"
        )
    pairs = fused_experts.unfuse_adapters(pairs)
    config = LoRA(
        targets=tuple(
            name.removesuffix(".weight") if pair.A.dim() == 2 else name
            for name, pair in pairs.items()
        ),
        rank=rank,
        alpha=keys.number("lora_alpha", 8),
        dropout=keys.number("lora_dropout", 0.0, above=-1),
        rslora=keys.flag("use_rslora", False),
    )
    return Adapters(config, pairs)


def _weights(folder: Path) -> Path:
    path = folder / ADAPTER_WEIGHTS_FILE
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = "; adapter_model.bin is pickled, which is never read here" if pickled else ""
        raise UserError(f"{folder}: has no {ADAPTER_WEIGHTS_FILE}{why}")
    return path


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in LM(model).state_dict().items()}


def _places(family: str, names: list[str]) -> dict[str, str]:
    """Weight -> the module that PEFT has its adapter in; `names` in the order of the model."""
    theirs = {name: _theirs(family, name) for name in names}
    modules = {
        name: found.removesuffix(".weight") if found.endswith(".weight") else _owner(found)
        for name, found in theirs.items()
    }
    order = list(modules.values())
    return {
        name: module + _DEEPER * order[index + 1 :].count(module)
        for index, (name, module) in enumerate(modules.items())
    }


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _theirs(family: str, name: str) -> str:
    try:
        if (
            not name.endswith(".weight")
            and family != TINSMITH_MODEL_TYPE
            and fused_experts.hf_name(name) is None
        ):
            raise KeyError(name)
        return _known(family, name)
    except KeyError:
        raise UserError(
            f"lora: {name} is no weight of its own in Hugging Face's {family}, so PEFT cannot have "
            "its adapter; the merged model has it"
        ) from None


def _known(family: str, name: str) -> str:
    return fused_experts.hf_name(name) or NAME_MAPS[family].to_hf_name(name)


def _leaves(module: str) -> tuple[str, str]:
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def _adapted(
    folder: Path,
    keys: ConfigReader,
    family: str,
    shapes: dict[str, tuple[int, ...]],
    stored: list[str],
) -> list[str]:
    """The weights that a file has adapters of: linear layers by their names, stacks where the
    config names them.
    """
    modules = {name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in stored}
    stacks = keys.data.get("target_parameters") or []
    if not isinstance(stacks, list):
        keys.fail("target_parameters", f"must be a list of names (got {stacks!r:.60})")
    found = [
        name
        for name, shape in shapes.items()
        if name.startswith("blocks.") and _has(family, name, len(shape), modules, stacks)
    ]
    if not found:
        raise UserError(
            f"{folder / ADAPTER_WEIGHTS_FILE}: has no adapter of a weight of this model"
        )
    return found


def _has(family: str, name: str, sides: int, modules: set[str], stacks: list[str]) -> bool:
    try:
        theirs = _known(family, name)
    except KeyError:
        return False
    if sides == 3:
        return any(f".{theirs}".endswith(f".{target}") for target in stacks)
    return sides == 2 and theirs.removesuffix(".weight") in modules


def _taken(tensors: dict[str, Tensor], name: str, folder: Path) -> Tensor:
    if name not in tensors:
        raise UserError(f"{folder / ADAPTER_WEIGHTS_FILE}: {name} is missing")
    return tensors.pop(name)


def _paired(
    name: str, A: Tensor, B: Tensor, shape: tuple[int, ...], rank: int, where: str
) -> LoRAWeights:
    *stack, rows, columns = shape
    count = stack[0] if stack else 1
    wanted = ((count * rank, columns), (rows, rank * count))
    if (tuple(A.shape), tuple(B.shape)) != wanted:
        sides = f"{list(A.shape)} and {list(B.shape)}, not {list(wanted[0])} and {list(wanted[1])}"
        raise UserError(f"{where}: lora_A and lora_B are {sides}")
    if not stack:
        return LoRAWeights(A, B)
    return LoRAWeights(
        A.unflatten(0, (count, rank)), B.unflatten(1, (rank, count)).permute(2, 0, 1)
    )


@torch.no_grad()
def attach_adapters(lm: LM, adapters: Adapters) -> None:
    """Give `lm` adapters of these numbers; the rest of it is frozen."""
    lora.add_adapters(lm, adapters.config)
    for name, adapter in lora.adapters(lm).items():
        adapter.A.copy_(adapters.pairs[name].A)
        adapter.B.copy_(adapters.pairs[name].B)


def merge_adapters(lm: LM, adapters: Adapters) -> None:
    """Fold adapters into the weights of a plain model."""
    lm.load_state_dict(
        lora.merged_state_dict(lm.state_dict(), adapters.pairs, adapters.config.scaling)
    )

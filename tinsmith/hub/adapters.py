"""Adapters as PEFT keeps them: `adapter_config.json` and `adapter_model.safetensors`.

Names are those of the Hugging Face model that `hub.hf` writes, with `base_model.model.` in front.
A linear layer has `NAME.lora_A.weight` (R, I) and `NAME.lora_B.weight` (O, R); where its family
orders rows differently, B's rows are reordered as the weight's are. A stack of experts is one of
PEFT's target parameters: A is (E R, I), B is (O, R E), and of several stacks in one module each but
the last is one `base_layer` deeper than the next. Of stock families the stacks are those of
`hub.fused`; of Tinsmith's own architecture PEFT must merge them before they count, as its models
read experts without a call of the module that PEFT watches.

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
from tinsmith.hub import fused
from tinsmith.hub.from_hf import OWN
from tinsmith.hub.keys import Keys
from tinsmith.hub.names import NAMES
from tinsmith.hub.tensors import header, read_tensors, save_tensors
from tinsmith.hub.to_hf import config_to_hf
from tinsmith.nn import lora
from tinsmith.nn.lora import LoRA, Pair
from tinsmith.nn.model import LM, ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
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
    pairs: dict[str, Pair]
    """By Tinsmith's names of the weights."""


def write_adapters(folder: Path, model: ModelConfig, made: Adapters, base: str | None) -> None:
    """Write the two files into `folder`, which is made where it is not there; `base` names the
    model that they are for.

    UserError where a weight has no counterpart in the Hugging Face family that `model` is written
    as, so that an adapter cannot have one.
    """
    family, shapes = config_to_hf(model).family, _shapes(model)
    config, pairs = made.config, made.pairs
    assert pairs.keys() <= shapes.keys(), "adapters of another model"
    if family in fused.FAMILIES:
        config, pairs = fused.together(config, pairs, shapes)
        shapes = fused.shapes(shapes)
    names = [name for name in shapes if name in pairs]
    tensors: dict[str, Tensor] = {}
    targets: dict[int, list[str]] = {2: [], 3: []}
    for name, module in _places(family, names).items():
        A, B = pairs[name]
        targets[A.dim()].append(module if A.dim() == 2 else _theirs(family, name))
        if A.dim() == 2:
            B = NAMES[family].sent(name, B, model)
        else:
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        tensors |= dict(zip(_leaves(module), (A, B), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, tensors)
    data = _described(config, base) | {
        "target_modules": targets[2],
        "target_parameters": targets[3] or None,
    }
    atomic_write(folder / CONFIG, json.dumps(data, indent=2) + "\n")


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


def read_adapters(folder: Path, model: ModelConfig) -> Adapters:
    """The adapters in a folder that PEFT, or `write_adapters`, has written for `model`.

    Strict: every tensor of the file must belong to a weight of the model. UserError names the
    first key or tensor that does not, and what PEFT can do and Tinsmith cannot (DoRA, other ranks
    for some layers, layers trained whole).
    """
    where = folder / CONFIG
    keys = Keys(read_object(where), str(where))
    for key, allowed in _ONLY.items():
        keys.only(key, allowed)
    family = config_to_hf(model).family
    shapes = _shapes(model)
    if family in fused.FAMILIES:
        shapes = fused.shapes(shapes)
    stored = header(_weights(folder))
    names = _adapted(folder, keys, family, shapes, list(stored))
    tensors = read_tensors(stored, None, None)
    rank = keys.size("r", 8)
    pairs: dict[str, Pair] = {}
    for name, module in _places(family, names).items():
        A, B = (_taken(tensors, leaf, folder) for leaf in _leaves(module))
        pair = _paired(name, A, B, shapes[name], rank, f"{folder / WEIGHTS}: {module}")
        if len(shapes[name]) == 2:
            pair = pair._replace(B=NAMES[family].received(name, pair.B, model))
        pairs[name] = pair
    for name in tensors:
        raise UserError(f"{folder / WEIGHTS}: {name} is of no weight that is adapted here")
    pairs = fused.apart(pairs)
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
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = "; adapter_model.bin is pickled, which is never read here" if pickled else ""
        raise UserError(f"{folder}: has no {WEIGHTS}{why}")
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
        if not name.endswith(".weight") and family != OWN and fused.theirs(name) is None:
            raise KeyError(name)
        return _known(family, name)
    except KeyError:
        raise UserError(
            f"lora: {name} is no weight of its own in Hugging Face's {family}, so PEFT cannot have "
            "its adapter; the merged model has it"
        ) from None


def _known(family: str, name: str) -> str:
    return fused.theirs(name) or NAMES[family].theirs(name)


def _leaves(module: str) -> tuple[str, str]:
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def _adapted(
    folder: Path, keys: Keys, family: str, shapes: dict[str, tuple[int, ...]], stored: list[str]
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
        raise UserError(f"{folder / WEIGHTS}: has no adapter of a weight of this model")
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
        raise UserError(f"{folder / WEIGHTS}: {name} is missing")
    return tensors.pop(name)


def _paired(name: str, A: Tensor, B: Tensor, shape: tuple[int, ...], rank: int, where: str) -> Pair:
    *stack, rows, columns = shape
    count = stack[0] if stack else 1
    wanted = ((count * rank, columns), (rows, rank * count))
    if (tuple(A.shape), tuple(B.shape)) != wanted:
        sides = f"{list(A.shape)} and {list(B.shape)}, not {list(wanted[0])} and {list(wanted[1])}"
        raise UserError(f"{where}: lora_A and lora_B are {sides}")
    if not stack:
        return Pair(A, B)
    return Pair(A.unflatten(0, (count, rank)), B.unflatten(1, (rank, count)).permute(2, 0, 1))


@torch.no_grad()
def attach(lm: LM, made: Adapters) -> None:
    """Give `lm` adapters of these numbers; the rest of it is frozen."""
    lora.add(lm, made.config)
    for name, adapter in lora.adapters(lm).items():
        adapter.A.copy_(made.pairs[name].A)
        adapter.B.copy_(made.pairs[name].B)


def fold(lm: LM, made: Adapters) -> None:
    """Fold adapters into the weights of a plain model."""
    lm.load_state_dict(lora.folded(lm.state_dict(), made.pairs, made.config.scale))

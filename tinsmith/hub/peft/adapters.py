"""Read and write LoRA adapters as PEFT does: `adapter_config.json`, `adapter_model.safetensors`.

Names are those of the Hugging Face model that `hub.hf` writes, with the prefix `base_model.model.`.
A linear layer has `NAME.lora_A.weight` (R, I) and `NAME.lora_B.weight` (O, R); if the family orders
the rows of the weight differently, the rows of B are reordered too. A stack of experts is one of
PEFT's target parameters: A is (E R, I) and B is (O, R E). PEFT nests the stacks of one module:
every stack is one `base_layer` deeper than the next stack. `peft.fused_experts` lists the stacks of
stock families. For `model_type: tinsmith`, PEFT must merge the adapters before they have an effect,
because Tinsmith's models read expert weights without calling the module that PEFT wraps.
Trained rows of new token ids are PEFT's `trainable_token_indices`. PEFT needs a base model with
those rows: `AutoPeftModelForCausalLM` adds them if the tokenizer is in the adapter's folder.

Legend: E experts, R rank, I and O the last two dimensions of a weight as it is stored.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
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
from tinsmith.nn.lora import AdapterWeights, LoRA, LoRAWeights, RowWeights
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.nn.parameters import target_weights

ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX, _NESTED = "base_model.model.", ".base_layer"

_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(("fan_in_fan_out", "use_dora", "lora_bias", "use_qalora"), (False,)),
    **dict.fromkeys(("modules_to_save", "layer_replication"), ([],)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), ({},)),
    **dict.fromkeys(("velora_config", "kasa_config", "arrow_config", "monteclora_config"), ()),
    **dict.fromkeys(("alora_invocation_tokens", "use_bdlora"), ()),
}
"""Keys that could change the computation, and the values at which they do not; null never does."""


class Adapters(NamedTuple):
    """The LoRA config and the adapters of a folder."""

    config: LoRA
    pairs: dict[str, LoRAWeights]
    """Adapters by Tinsmith's names of the weights."""
    rows: dict[str, RowWeights] = {}
    """Trained rows of the embedding and of a head that is not tied to it."""

    @classmethod
    def from_weights(cls, config: LoRA, weights: Mapping[str, AdapterWeights]) -> "Adapters":
        """Separate the adapters of a state dict by kind."""
        pairs = {name: part for name, part in weights.items() if isinstance(part, LoRAWeights)}
        rows = {name: part for name, part in weights.items() if isinstance(part, RowWeights)}
        return cls(config, pairs, rows)


def write_adapters(
    folder: Path, model_config: ModelConfig, adapters: Adapters, base_model: str | None
) -> None:
    """Write the two files into `folder`; `base_model` names the model to which the adapters belong.

    UserError if a weight has no counterpart in the Hugging Face family of the model, because PEFT
    cannot have its adapter then.
    """
    family, shapes = config_to_hf(model_config).family, _target_shapes(model_config)
    config, pairs, _ = adapters
    assert pairs.keys() <= shapes.keys(), "adapters of another model"
    if family in fused_experts.FAMILIES:
        config, pairs = fused_experts.fuse_adapters(config, pairs, shapes)
        shapes = fused_experts.fused_shapes(shapes)
    names = [name for name in shapes if name in pairs]
    tensors = {_rows_name(family, name): part.rows for name, part in adapters.rows.items()}
    targets: dict[int, list[str]] = {2: [], 3: []}
    for name, module in _peft_modules(family, names).items():
        A, B = pairs[name]
        targets[A.dim()].append(module if A.dim() == 2 else _hf_parameter(family, name))
        if A.dim() == 2:
            B = NAME_MAPS[family].to_hf_tensor(name, B, model_config)
        else:
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        tensors |= dict(zip(_tensor_names(module), (A, B), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / ADAPTER_WEIGHTS_FILE, tensors)
    data = _peft_config(config, base_model) | {
        "target_modules": targets[2],
        "target_parameters": targets[3] or None,
        "trainable_token_indices": {
            _hf_parameter(family, name).split(".")[-2]: list(
                range(part.first, part.first + len(part.rows))
            )
            for name, part in adapters.rows.items()
        }
        or None,
    }
    atomic_write(folder / ADAPTER_CONFIG_FILE, json.dumps(data, indent=2) + "\n")


def _peft_config(config: LoRA, base_model: str | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
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
    """Read adapters for a model from a folder that PEFT or `write_adapters` wrote.

    Strict: every tensor of the file must belong to a weight of the model. UserError names the first
    key or tensor that does not, and features of PEFT that Tinsmith lacks (DoRA, other ranks for
    some layers, fully trained layers).
    """
    where = folder / ADAPTER_CONFIG_FILE
    keys = ConfigReader(read_object(where), str(where))
    for key, allowed in _ONLY.items():
        keys.check_allowed(key, allowed)
    family = config_to_hf(model_config).family
    shapes = _target_shapes(model_config)
    if family in fused_experts.FAMILIES:
        shapes = fused_experts.fused_shapes(shapes)
    stored = read_header(_weights_path(folder))
    names = _adapted_weights(folder, keys, family, shapes, list(stored))
    tensors = read_tensors(stored, None, None)
    rank = keys.positive_int("r", 8)
    pairs: dict[str, LoRAWeights] = {}
    for name, module in _peft_modules(family, names).items():
        A, B = (_pop(tensors, leaf, folder) for leaf in _tensor_names(module))
        pair = _unpack(name, A, B, shapes[name], rank, f"{folder / ADAPTER_WEIGHTS_FILE}: {module}")
        if len(shapes[name]) == 2:
            pair = pair._replace(B=NAME_MAPS[family].from_hf_tensor(name, pair.B, model_config))
        pairs[name] = pair
    rows = _read_rows(keys, family, tensors, model_config)
    for name in tensors:
        raise UserError(
            f"{folder / ADAPTER_WEIGHTS_FILE}: {name} belongs to no adapted weight of this model"
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
        trainable_tokens_from=rows["embed.weight"].first if rows else None,
    )
    return Adapters(config, pairs, rows)


def _read_rows(
    keys: ConfigReader, family: str, tensors: dict[str, Tensor], model: ModelConfig
) -> dict[str, RowWeights]:
    """Take the trained rows of embedding and head from the tensors of an adapter."""
    stored = keys.data.get("trainable_token_indices") or {}
    indices = list(stored.values()) if isinstance(stored, dict) else [stored]
    rows: dict[str, RowWeights] = {}
    for name in ("embed.weight", "head.weight"):
        tensor = tensors.pop(_rows_name(family, name), None)
        if tensor is None:
            continue
        first = indices[0][0]
        last = max(model.vocab_size, first + len(tensor))
        if any(ids != list(range(first, last)) for ids in indices):
            keys.fail("trainable_token_indices", "must be the last ids of the vocabulary")
        if tensor.shape != (last - first, model.dim):
            keys.fail("trainable_token_indices", f"has rows {list(tensor.shape)}")
        rows[name] = RowWeights(first, tensor)
    return rows


def _rows_name(family: str, name: str) -> str:
    module = _hf_parameter(family, name).removesuffix(".weight")
    return f"{_PEFT_PREFIX}{module}.token_adapter.trainable_tokens_delta"


def _weights_path(folder: Path) -> Path:
    path = folder / ADAPTER_WEIGHTS_FILE
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = "; adapter_model.bin is pickled, which is never read here" if pickled else ""
        raise UserError(f"{folder}: has no {ADAPTER_WEIGHTS_FILE}{hint}")
    return path


def _target_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that can have adapters: 2-D, 3-D for stacks of experts."""
    with torch.device("meta"):
        lm = LM(model)
    return {
        target.full_name: tuple(target.module.get_parameter(target.param_name).shape)
        for target in target_weights(lm)
    }


def _peft_modules(family: str, names: list[str]) -> dict[str, str]:
    """Map every weight to the module in which PEFT has its adapter; `names` are in model order."""
    hf_names = {name: _hf_parameter(family, name) for name in names}
    modules = {
        name: hf_name.removesuffix(".weight")
        if hf_name.endswith(".weight")
        else _module_of(hf_name)
        for name, hf_name in hf_names.items()
    }
    modules_in_order = list(modules.values())
    return {
        name: module + _NESTED * modules_in_order[index + 1 :].count(module)
        for index, (name, module) in enumerate(modules.items())
    }


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def _hf_parameter(family: str, name: str) -> str:
    try:
        if (
            not name.endswith(".weight")
            and family != TINSMITH_MODEL_TYPE
            and fused_experts.hf_name(name) is None
        ):
            raise KeyError(name)
        return _hf_name(family, name)
    except KeyError:
        raise UserError(
            f"lora: {name} is not a separate weight in Hugging Face's {family}, so PEFT cannot "
            "have its adapter; export the merged model instead"
        ) from None


def _hf_name(family: str, name: str) -> str:
    return fused_experts.hf_name(name) or NAME_MAPS[family].to_hf_name(name)


def _tensor_names(module: str) -> tuple[str, str]:
    return f"{_PEFT_PREFIX}{module}.lora_A.weight", f"{_PEFT_PREFIX}{module}.lora_B.weight"


def _adapted_weights(
    folder: Path,
    keys: ConfigReader,
    family: str,
    shapes: dict[str, tuple[int, ...]],
    stored: list[str],
) -> list[str]:
    """List the adapted weights: linear layers by tensor name, stacks by `target_parameters`."""
    modules = {name.removeprefix(_PEFT_PREFIX).rpartition(".lora_")[0] for name in stored}
    stacks = keys.data.get("target_parameters") or []
    if not isinstance(stacks, list):
        keys.fail("target_parameters", f"must be a list of names (got {stacks!r:.60})")
    adapted = [
        name
        for name, shape in shapes.items()
        if name.startswith("blocks.") and _is_adapted(family, name, len(shape), modules, stacks)
    ]
    if not adapted:
        raise UserError(
            f"{folder / ADAPTER_WEIGHTS_FILE}: has no adapter of a weight of this model"
        )
    return adapted


def _is_adapted(
    family: str, name: str, num_dims: int, modules: set[str], stacks: list[str]
) -> bool:
    try:
        hf_name = _hf_name(family, name)
    except KeyError:
        return False
    if num_dims == 3:
        return any(f".{hf_name}".endswith(f".{target}") for target in stacks)
    return num_dims == 2 and hf_name.removesuffix(".weight") in modules


def _pop(tensors: dict[str, Tensor], name: str, folder: Path) -> Tensor:
    if name not in tensors:
        raise UserError(f"{folder / ADAPTER_WEIGHTS_FILE}: {name} is missing")
    return tensors.pop(name)


def _unpack(
    name: str, A: Tensor, B: Tensor, shape: tuple[int, ...], rank: int, where: str
) -> LoRAWeights:
    """Check the shapes of PEFT's A and B and separate the experts of a stack."""
    *stack, rows, columns = shape
    count = stack[0] if stack else 1
    expected = ((count * rank, columns), (rows, rank * count))
    if (tuple(A.shape), tuple(B.shape)) != expected:
        shapes = (
            f"{list(A.shape)} and {list(B.shape)}, not {list(expected[0])} and {list(expected[1])}"
        )
        raise UserError(f"{where}: lora_A and lora_B are {shapes}")
    if not stack:
        return LoRAWeights(A, B)
    return LoRAWeights(
        A.unflatten(0, (count, rank)), B.unflatten(1, (rank, count)).permute(2, 0, 1)
    )


@torch.no_grad()
def attach_adapters(lm: LM, adapters: Adapters) -> None:
    """Add adapters with these values to `lm` and freeze its other parameters."""
    lora.add_adapters(lm, adapters.config)
    for name, adapter in lora.adapters(lm).items():
        stored = adapters.pairs.get(name) or adapters.rows.get(name)
        for leaf, parameter in adapter.named_parameters() if stored else ():
            parameter.copy_(getattr(stored, leaf))


def merge_adapters(lm: LM, adapters: Adapters) -> LM:
    """Return the model with adapters merged into its weights. New token ids enlarge it."""
    weights = adapters.pairs | adapters.rows
    state = lora.merged_state_dict(lm.state_dict(), weights, adapters.config.scaling)
    if lm.config.tie_embeddings:
        state["head.weight"] = state["embed.weight"]
    vocab_size = len(state["embed.weight"])
    if vocab_size != lm.config.vocab_size:
        like = lm.embed.weight
        lm = LM(replace(lm.config, vocab_size=vocab_size)).to(like.device, like.dtype).eval()
    lm.load_state_dict(state)
    return lm

"""A model from stored tensors: built without memory of its own, then given exactly those."""

import re

import torch
from torch import Tensor

from tinsmith.core.errors import UserError
from tinsmith.hub.families.names import NameMap
from tinsmith.hub.tensors import TensorInfo, read_tensors
from tinsmith.nn import lora
from tinsmith.nn.lora import LoRA
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.nn.precision import fp32_param_names

_REDUNDANT = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Buffers of older transformers, which follow from the config."""

_EMBED, _HEAD = "embed.weight", "head.weight"


def materialize(
    config: ModelConfig,
    stored_tensors: dict[str, TensorInfo],
    name_map: NameMap,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    where: str,
    lora_config: LoRA | None = None,
) -> LM:
    """A model in eval mode whose tensors are those of a folder, by `names`; where adapters are
    among them, they are folded into the weights.

    UserError, naming the first tensor, where one is missing, of another shape, or not wanted.
    `dtype` is that of weights, None what the files have; buffers, and what decides, always keep it.
    """
    with torch.device("meta"):
        lm, shapes = LM(config), _shapes(config, name_map, lora_config)
    wanted = {name: name_map.to_hf_name(name) for name in shapes}
    head = name_map.to_hf_name(_HEAD) if config.tie_embeddings else None
    buffers = {name: name_map.to_hf_name(name) for name, _ in lm.named_buffers()}
    counters = {theirs for name, theirs in buffers.items() if name not in shapes}
    stored_tensors = {name: part for name, part in stored_tensors.items() if name not in counters}
    _compare({wanted[name]: shape for name, shape in shapes.items()}, stored_tensors, head, where)
    stored = {
        name: stored_tensors[name] for name in [*wanted.values(), head] if name in stored_tensors
    }
    kind = dtype if lora_config is None else None
    kept = fp32_param_names(lm) | buffers.keys()
    exact = {theirs: stored.pop(theirs) for name, theirs in wanted.items() if name in kept}
    state = read_tensors(stored, kind, device) | read_tensors(exact, None, device)
    if head in state:
        _same(state.pop(head), state[wanted[_EMBED]], head, where)
    ours = {
        name: name_map.from_hf_tensor(name, state[theirs], config)
        for name, theirs in wanted.items()
    }
    if lora_config is not None:
        merged = lora.merged_state_dict(*lora.split_state_dict(ours), lora_config.scaling)
        kinds = {name: dtype for name in merged if dtype and name not in kept}
        ours = {name: tensor.to(kinds.get(name, tensor.dtype)) for name, tensor in merged.items()}
    if config.tie_embeddings:
        ours[_HEAD] = ours[_EMBED]
    lm.load_state_dict(name_map.stack_experts(ours), assign=True)
    if config.tie_embeddings:
        lm.head.weight = lm.embed.weight
    _from_zero(lm, device)
    return lm.eval()


def _shapes(
    config: ModelConfig, names: NameMap, adapted: LoRA | None
) -> dict[str, tuple[int, ...]]:
    """Of everything that is stored of a model, by its names."""
    whole = LM(config)
    if adapted is not None:
        lora.add_adapters(whole, adapted)
    shapes = {
        name: tuple(part.shape) for name, part in names.split_experts(whole.state_dict()).items()
    }
    if config.tie_embeddings:
        del shapes[_HEAD]
    return shapes


def _from_zero(lm: LM, device: torch.device | str | None) -> None:
    """Counters that belong to a run, and not to its model, begin anew."""
    for module in lm.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                zero = torch.zeros_like(buffer, device=device or "cpu")
                module.register_buffer(name, zero, persistent=False)


def _compare(
    wanted: dict[str, tuple[int, ...]], found: dict[str, TensorInfo], head: str | None, where: str
) -> None:
    for name, shape in wanted.items():
        if name not in found:
            raise UserError(f"{where}: tensor {name} is missing")
        if found[name].shape != shape:
            file, has = found[name].file, list(found[name].shape)
            raise UserError(f"{file}: tensor {name} is {has}; the config asks for {list(shape)}")
        if not found[name].is_weight:
            raise UserError(f"{found[name].file}: {name} holds whole numbers and no weights")
    for name in sorted(found):
        if name not in wanted and name != head and not _REDUNDANT.fullmatch(name):
            raise UserError(f"{found[name].file}: tensor {name} is not part of this model")


def _same(head: Tensor, embed: Tensor, name: str, where: str) -> None:
    if not torch.equal(head, embed):
        raise UserError(
            f"{where}: tensor {name} differs from the embedding, though config.json ties the two"
        )

"""Build a model on the meta device and assign stored tensors to it."""

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
"""Buffers that older versions of transformers store; they follow from the config."""

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
    """Return a model in eval mode whose tensors are those of a folder, translated by `name_map`.

    If `lora_config` is given, the folder also holds adapters, which are merged into the weights.
    UserError names the first tensor that is missing, has another shape, or does not belong to the
    model. `dtype` (None: that of the files) applies to weights; buffers and parameters kept in fp32
    (`fp32_param_names`) keep the dtype of the files.
    """
    with torch.device("meta"):
        lm, shapes = LM(config), _stored_shapes(config, name_map, lora_config)
    hf_names = {name: name_map.to_hf_name(name) for name in shapes}
    head = name_map.to_hf_name(_HEAD) if config.tie_embeddings else None
    buffer_names = {name: name_map.to_hf_name(name) for name, _ in lm.named_buffers()}
    counters = {hf_name for name, hf_name in buffer_names.items() if name not in shapes}
    stored_tensors = {name: part for name, part in stored_tensors.items() if name not in counters}
    _check_tensors(
        {hf_names[name]: shape for name, shape in shapes.items()}, stored_tensors, head, where
    )
    stored = {
        name: stored_tensors[name] for name in [*hf_names.values(), head] if name in stored_tensors
    }
    read_dtype = dtype if lora_config is None else None
    exact_names = fp32_param_names(lm) | buffer_names.keys()
    exact = {
        hf_name: stored.pop(hf_name) for name, hf_name in hf_names.items() if name in exact_names
    }
    hf_state = read_tensors(stored, read_dtype, device) | read_tensors(exact, None, device)
    if head in hf_state:
        _check_tied(hf_state.pop(head), hf_state[hf_names[_EMBED]], head, where)
    state = {
        name: name_map.from_hf_tensor(name, hf_state[hf_name], config)
        for name, hf_name in hf_names.items()
    }
    if lora_config is not None:
        merged = lora.merged_state_dict(*lora.split_state_dict(state), lora_config.scaling)
        dtypes = {name: dtype for name in merged if dtype and name not in exact_names}
        state = {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in merged.items()}
    if config.tie_embeddings:
        state[_HEAD] = state[_EMBED]
    lm.load_state_dict(name_map.stack_experts(state), assign=True)
    if config.tie_embeddings:
        lm.head.weight = lm.embed.weight
    _zero_counters(lm, device)
    return lm.eval()


def _stored_shapes(
    config: ModelConfig, name_map: NameMap, lora_config: LoRA | None
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every stored tensor of a model, by Tinsmith's names."""
    lm = LM(config)
    if lora_config is not None:
        lora.add_adapters(lm, lora_config)
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in name_map.split_experts(lm.state_dict()).items()
    }
    if config.tie_embeddings:
        del shapes[_HEAD]
    return shapes


def _zero_counters(lm: LM, device: torch.device | str | None) -> None:
    """Set counters to 0: they belong to a training run and are not stored with the model."""
    for module in lm.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                zero = torch.zeros_like(buffer, device=device or "cpu")
                module.register_buffer(name, zero, persistent=False)


def _check_tensors(
    expected: dict[str, tuple[int, ...]],
    stored: dict[str, TensorInfo],
    head: str | None,
    where: str,
) -> None:
    for name, shape in expected.items():
        if name not in stored:
            raise UserError(f"{where}: tensor {name} is missing")
        if stored[name].shape != shape:
            file, stored_shape = stored[name].file, list(stored[name].shape)
            raise UserError(
                f"{file}: tensor {name} is {stored_shape}; the config asks for {list(shape)}"
            )
        if not stored[name].is_weight:
            raise UserError(f"{stored[name].file}: {name} holds integers, not weights")
    for name in sorted(stored):
        if name not in expected and name != head and not _REDUNDANT.fullmatch(name):
            raise UserError(f"{stored[name].file}: tensor {name} is not part of this model")


def _check_tied(head: Tensor, embed: Tensor, name: str, where: str) -> None:
    if not torch.equal(head, embed):
        raise UserError(
            f"{where}: tensor {name} differs from the embedding, though config.json ties the two"
        )

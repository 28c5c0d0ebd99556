"""Tensor names: Tinsmith's and those of Hugging Face's families, one to one.

A table lists modules, and `WHOLE` lists tensors. `{}` stands for the index of a block or expert.
`.weight` and `.bias` are the same on both sides. Hugging Face files hold each expert of a stack as
a tensor of its own (`families.moe`). Values are equal too, except for the rotated parts of
DeepSeek's projections, whose rows are in another order.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tinsmith.hub.families import moe
from tinsmith.nn.config import ModelConfig
from tinsmith.nn.mixers.mla import MLA

LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "blocks.{}.mix_norm": "model.layers.{}.input_layernorm",
    "blocks.{}.mixer.q_proj": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.mixer.k_proj": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.mixer.v_proj": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.mixer.o_proj": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.mixer.q_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.mixer.k_norm": "model.layers.{}.self_attn.k_norm",
    "blocks.{}.feed_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.feed.gate_proj": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.feed.up_proj": "model.layers.{}.mlp.up_proj",
    "blocks.{}.feed.down_proj": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
"""Llama, Mistral, Qwen2 and Qwen3."""


def _experts(theirs: str, gate: str, up: str, down: str) -> dict[str, str]:
    """The router and the experts of a family that keeps them in its module `theirs`."""
    ours, place = "blocks.{}.feed", f"model.layers.{{}}.{theirs}"
    matrices = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    return {f"{ours}.router": f"{place}.gate"} | {
        f"{ours}.experts.{{}}.{mine}": f"{place}.experts.{{}}.{name}"
        for mine, name in matrices.items()
    }


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
QWEN3_MOE_NAMES = LLAMA_NAMES | _experts("mlp", *_PROJECTIONS)
MIXTRAL_NAMES = {
    ours: theirs for ours, theirs in LLAMA_NAMES.items() if ".feed." not in ours
} | _experts("block_sparse_moe", "w1", "w3", "w2")

DEEPSEEK_NAMES = {ours: theirs for ours, theirs in LLAMA_NAMES.items() if ".mixer." not in ours} | {
    "blocks.{}.mixer.queries.straight": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.mixer.queries.down": "model.layers.{}.self_attn.q_a_proj",
    "blocks.{}.mixer.queries.norm": "model.layers.{}.self_attn.q_a_layernorm",
    "blocks.{}.mixer.queries.up": "model.layers.{}.self_attn.q_b_proj",
    "blocks.{}.mixer.keys.down": "model.layers.{}.self_attn.kv_a_proj_with_mqa",
    "blocks.{}.mixer.keys.norm": "model.layers.{}.self_attn.kv_a_layernorm",
    "blocks.{}.mixer.keys.up": "model.layers.{}.self_attn.kv_b_proj",
    "blocks.{}.mixer.o_proj": "model.layers.{}.self_attn.o_proj",
    **_experts("mlp", *_PROJECTIONS),
    **{
        f"blocks.{{}}.feed.shared.{name}": f"model.layers.{{}}.mlp.shared_experts.{name}"
        for name in _PROJECTIONS
    },
}
"""DeepSeek-V2 and V3."""
DEEPSEEK_TENSOR_NAMES = {"blocks.{}.feed.bias": "model.layers.{}.mlp.gate.e_score_correction_bias"}
"""Tensors that are no module's weight or bias on one of the sides."""


def _same(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    return tensor


TensorTransform = Callable[[str, Tensor, ModelConfig], Tensor]
StateDict = dict[str, Tensor]


def _whole(state: StateDict) -> StateDict:
    return state


class NameMap(NamedTuple):
    """A family's names, and what becomes of a tensor (by Tinsmith's name) on the way. The first
    two raise KeyError on a name that has no counterpart. They name what `apart` gives.
    """

    to_hf_name: Callable[[str], str]
    from_hf_name: Callable[[str], str]
    to_hf_tensor: TensorTransform = _same
    from_hf_tensor: TensorTransform = _same
    split_experts: Callable[[StateDict], StateDict] = _whole
    stack_experts: Callable[[StateDict], StateDict] = _whole


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def _mapped(table: dict[str, str], whole: dict[str, str]) -> Callable[[str], str]:
    def convert(name: str) -> str:
        numbers = _NUMBER.findall(name)
        if (tensor := whole.get(_NUMBER.sub("{}", name))) is not None and "{" not in name:
            return tensor.format(*numbers)
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias") or "{" in module:
            raise KeyError(name)
        return f"{table[_NUMBER.sub('{}', module)].format(*numbers)}.{leaf}"

    return convert


def _from_table(table: dict[str, str], whole: dict[str, str] | None = None) -> NameMap:
    """Stacks of experts lie apart in the files of every family."""
    tensors = whole or {}
    theirs = _mapped(table, tensors)
    ours = _mapped(_inverse(table), _inverse(tensors))
    return NameMap(theirs, ours, split_experts=moe.split_experts, stack_experts=moe.stack_experts)


def _inverse(table: dict[str, str]) -> dict[str, str]:
    inverse = {theirs: ours for ours, theirs in table.items()}
    assert len(inverse) == len(table)
    return inverse


def _without_prefix(name: str) -> str:
    if not name.startswith(_PREFIX):
        raise KeyError(name)
    return name.removeprefix(_PREFIX)


_PREFIX = "lm."
"""Where `hub.auto.TinsmithForCausalLM` holds the model."""

IDENTITY_MAP = NameMap(str, str)
"""A checkpoint's: Tinsmith's own."""

_TURNED = re.compile(r"blocks\.(\d+)\.mixer\.(queries\.up|queries\.straight|keys\.down)\.weight")


def _reordered(
    name: str, tensor: Tensor, config: ModelConfig, table: Callable[[int], Tensor]
) -> Tensor:
    """The rows that are turned, the last of every head's (keys have one), read by columns of a
    table of their numbers.
    """
    match = _TURNED.fullmatch(name)
    mixer = config.layers[int(match[1]) if match else 0].mixer
    if match is None or not isinstance(mixer, MLA):
        return tensor
    order = table(mixer.rope_dim).T.flatten().to(tensor.device)
    rows = tensor.unflatten(0, (1 if match[2] == "keys.down" else mixer.heads, -1))
    kept = rows.shape[1] - mixer.rope_dim
    turned = rows[:, kept:][:, order]
    return torch.cat((rows[:, :kept], turned), 1).flatten(0, 1)


def _to_pairs(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Half-split, i turns with i + R/2, to DeepSeek's pairs, 2i with 2i + 1."""
    return _reordered(name, tensor, config, lambda width: torch.arange(width).view(2, -1))


def _to_halves(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    return _reordered(name, tensor, config, lambda width: torch.arange(width).view(-1, 2))


_DEEPSEEK = _from_table(DEEPSEEK_NAMES, DEEPSEEK_TENSOR_NAMES)._replace(
    to_hf_tensor=_to_pairs, from_hf_tensor=_to_halves
)

NAME_MAPS = {
    family: _from_table(LLAMA_NAMES) for family in ("llama", "mistral", "qwen2", "qwen3")
} | {
    "qwen3_moe": _from_table(QWEN3_MOE_NAMES),
    "mixtral": _from_table(MIXTRAL_NAMES),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "tinsmith": NameMap(lambda name: _PREFIX + name, _without_prefix),
}
"""By `model_type` of config.json."""

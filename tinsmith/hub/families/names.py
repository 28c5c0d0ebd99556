"""Translate tensor names between Tinsmith and Hugging Face's families, one to one.

`*_NAMES` map modules and `*_TENSOR_NAMES` map tensors. `{}` stands for the index of a block or an
expert. `.weight` and `.bias` are the same on both sides. Tinsmith stores the experts of a layer as
one stack (E, O, I), Hugging Face files store a tensor for each expert:

    blocks.3.feed.experts.up_proj.weight  <->  blocks.3.feed.experts.0.up_proj.weight, ...

Values are equal, except for the rotated parts of DeepSeek's projections, whose rows are in another
order.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

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


def _expert_names(hf_module: str, gate: str, up: str, down: str) -> dict[str, str]:
    """Return the names of router and experts of a family whose MoE module is `hf_module`."""
    feed, hf_feed = "blocks.{}.feed", f"model.layers.{{}}.{hf_module}"
    matrices = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    return {f"{feed}.router": f"{hf_feed}.gate"} | {
        f"{feed}.experts.{{}}.{name}": f"{hf_feed}.experts.{{}}.{hf_name}"
        for name, hf_name in matrices.items()
    }


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
QWEN3_MOE_NAMES = LLAMA_NAMES | _expert_names("mlp", *_PROJECTIONS)
MIXTRAL_NAMES = {
    name: hf_name for name, hf_name in LLAMA_NAMES.items() if ".feed." not in name
} | _expert_names("block_sparse_moe", "w1", "w3", "w2")

DEEPSEEK_NAMES = {
    name: hf_name for name, hf_name in LLAMA_NAMES.items() if ".mixer." not in name
} | {
    "blocks.{}.mixer.queries.straight": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.mixer.queries.down": "model.layers.{}.self_attn.q_a_proj",
    "blocks.{}.mixer.queries.norm": "model.layers.{}.self_attn.q_a_layernorm",
    "blocks.{}.mixer.queries.up": "model.layers.{}.self_attn.q_b_proj",
    "blocks.{}.mixer.keys.down": "model.layers.{}.self_attn.kv_a_proj_with_mqa",
    "blocks.{}.mixer.keys.norm": "model.layers.{}.self_attn.kv_a_layernorm",
    "blocks.{}.mixer.keys.up": "model.layers.{}.self_attn.kv_b_proj",
    "blocks.{}.mixer.o_proj": "model.layers.{}.self_attn.o_proj",
    **_expert_names("mlp", *_PROJECTIONS),
    **{
        f"blocks.{{}}.feed.shared.{name}": f"model.layers.{{}}.mlp.shared_experts.{name}"
        for name in _PROJECTIONS
    },
}
"""DeepSeek-V2 and V3."""
DEEPSEEK_TENSOR_NAMES = {"blocks.{}.feed.bias": "model.layers.{}.mlp.gate.e_score_correction_bias"}
"""Tensors that are not the weight or bias of a module on one of the sides."""


_STACK = re.compile(r"(.*\.feed\.experts)\.([a-z_]+\.weight)")
_EXPERT = re.compile(r"(.*\.feed\.experts)\.(\d+)\.([a-z_]+\.weight)")


def _split_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split every stack (E, O, I) into one tensor for each expert, views of the stack."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _STACK.fullmatch(name)
        if match is None:
            result[name] = tensor
        else:
            result |= {f"{match[1]}.{e}.{match[2]}": matrix for e, matrix in enumerate(tensor)}
    return result


def _stack_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack the tensors of experts; the inverse of `_split_experts`."""
    others: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            others[name] = tensor
        else:
            stacks.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
    return others | {
        name: torch.stack([matrices[e] for e in range(len(matrices))])
        for name, matrices in stacks.items()
    }


def _same_tensor(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    return tensor


TensorTransform = Callable[[str, Tensor, ModelConfig], Tensor]
StateDict = dict[str, Tensor]


def _same_state(state: StateDict) -> StateDict:
    return state


class NameMap(NamedTuple):
    """The tensor names of a family, and transforms of its tensors (by Tinsmith's name).

    `to_hf_name` and `from_hf_name` raise KeyError for unknown names; they take the names that
    `split_experts` returns.
    """

    to_hf_name: Callable[[str], str]
    from_hf_name: Callable[[str], str]
    to_hf_tensor: TensorTransform = _same_tensor
    from_hf_tensor: TensorTransform = _same_tensor
    split_experts: Callable[[StateDict], StateDict] = _same_state
    stack_experts: Callable[[StateDict], StateDict] = _same_state


_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


def _translator(module_names: dict[str, str], tensor_names: dict[str, str]) -> Callable[[str], str]:
    def convert(name: str) -> str:
        indices = _INDEX.findall(name)
        if (target := tensor_names.get(_INDEX.sub("{}", name))) is not None and "{" not in name:
            return target.format(*indices)
        module, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias") or "{" in module:
            raise KeyError(name)
        return f"{module_names[_INDEX.sub('{}', module)].format(*indices)}.{suffix}"

    return convert


def _from_table(
    module_names: dict[str, str], tensor_names: dict[str, str] | None = None
) -> NameMap:
    """Return the name map of a stock family, whose files store every expert separately."""
    tensors = tensor_names or {}
    to_hf_name = _translator(module_names, tensors)
    from_hf_name = _translator(_inverse(module_names), _inverse(tensors))
    return NameMap(
        to_hf_name, from_hf_name, split_experts=_split_experts, stack_experts=_stack_experts
    )


def _inverse(table: dict[str, str]) -> dict[str, str]:
    inverse = {hf_name: name for name, hf_name in table.items()}
    assert len(inverse) == len(table)
    return inverse


def _without_prefix(name: str) -> str:
    if not name.startswith(_PREFIX):
        raise KeyError(name)
    return name.removeprefix(_PREFIX)


_PREFIX = "lm."
"""Prefix of the model inside `hub.auto.TinsmithForCausalLM`."""

IDENTITY_MAP = NameMap(str, str)
"""The names of a checkpoint, which are Tinsmith's own."""

_ROTATED = re.compile(r"blocks\.(\d+)\.mixer\.(queries\.up|queries\.straight|keys\.down)\.weight")


def _reorder_rotated(
    name: str, tensor: Tensor, config: ModelConfig, table: Callable[[int], Tensor]
) -> Tensor:
    """Reorder the rotated rows of a projection, the last ones of every head (keys have one head).

    The new order is `table(rope_dim)`, a table of row indices, read column by column.
    """
    match = _ROTATED.fullmatch(name)
    mixer = config.layers[int(match[1]) if match else 0].mixer
    if match is None or not isinstance(mixer, MLA):
        return tensor
    order = table(mixer.rope_dim).T.flatten().to(tensor.device)
    rows = tensor.unflatten(0, (1 if match[2] == "keys.down" else mixer.heads, -1))
    num_unrotated = rows.shape[1] - mixer.rope_dim
    rotated = rows[:, num_unrotated:][:, order]
    return torch.cat((rows[:, :num_unrotated], rotated), 1).flatten(0, 1)


def _to_pairs(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Reorder half-split pairs (i rotates with i + R/2) to DeepSeek's pairs (2i with 2i + 1)."""
    return _reorder_rotated(name, tensor, config, lambda width: torch.arange(width).view(2, -1))


def _to_halves(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Reorder DeepSeek's pairs to half-split pairs, the inverse of `_to_pairs`."""
    return _reorder_rotated(name, tensor, config, lambda width: torch.arange(width).view(-1, 2))


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
"""Name maps by the `model_type` of config.json."""

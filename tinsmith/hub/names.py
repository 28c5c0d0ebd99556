"""Tensor names: Tinsmith's and those of Hugging Face's families, one to one.

A table lists modules; `{}` stands for a number (of a block), and `.weight` and `.bias` are the same
on both sides. Tensors of these families are also equal in content, so names are all there is to
convert.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

DECODER = {
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


class Names(NamedTuple):
    """A family's names. Both functions raise KeyError on a name that has no counterpart."""

    theirs: Callable[[str], str]
    ours: Callable[[str], str]


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def _mapped(table: dict[str, str]) -> Callable[[str], str]:
    def convert(name: str) -> str:
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias") or "{" in module:
            raise KeyError(name)
        numbers = _NUMBER.findall(module)
        return f"{table[_NUMBER.sub('{}', module)].format(*numbers)}.{leaf}"

    return convert


def _from_table(table: dict[str, str]) -> Names:
    inverse = {theirs: ours for ours, theirs in table.items()}
    assert len(inverse) == len(table)
    return Names(_mapped(table), _mapped(inverse))


def _without_prefix(name: str) -> str:
    if not name.startswith(_PREFIX):
        raise KeyError(name)
    return name.removeprefix(_PREFIX)


_PREFIX = "lm."
"""Where `hub.auto.TinsmithForCausalLM` holds the model."""

SAME = Names(str, str)
"""A checkpoint's: Tinsmith's own."""

NAMES = {family: _from_table(DECODER) for family in ("llama", "mistral", "qwen2", "qwen3")} | {
    "tinsmith": Names(lambda name: _PREFIX + name, _without_prefix)
}
"""By `model_type` of config.json."""

"""`ModelConfig` to `config.json`: the stock family that computes exactly the same, where there is
one. What none of them can express is written with `model_type: tinsmith` and Tinsmith's own
description inside.
"""

from typing import Any, NamedTuple

from tinsmith.core.parse import to_plain
from tinsmith.hub.families import deepseek, llama, moe
from tinsmith.hub.from_hf import SCHEMA_VERSION, TINSMITH_MODEL_TYPE, TRAINABLE_KEY, config_from_hf
from tinsmith.nn.config import ModelConfig
from tinsmith.nn.feedforwards import FeedForwardConfig
from tinsmith.nn.feedforwards.deepseek import DeepSeekMoE
from tinsmith.nn.feedforwards.dense import SwiGLU
from tinsmith.nn.feedforwards.topk import TopKMoE
from tinsmith.nn.mixers.gqa import GQA
from tinsmith.nn.mixers.mla import MLA
from tinsmith.nn.parameters import ALL_PARAMETERS
from tinsmith.nn.residuals.plain import Plain

_SIDES = {GQA: llama, MLA: deepseek}
_FEEDS = {GQA: (SwiGLU, TopKMoE), MLA: (SwiGLU, DeepSeekMoE)}


class HFConfig(NamedTuple):
    """A `config.json`: its content, whose class opens it, and why it is not a stock one."""

    data: dict[str, Any]
    family: str
    reason: str | None = None


def config_to_hf(config: ModelConfig) -> HFConfig:
    """A `config.json` of the stock family that computes exactly this model, or Tinsmith's own.

    What only acts in training (dropout but for attention's, how attention is computed) is no reason
    against a stock family.
    """
    reason = why_not_stock(config)
    if reason is not None:
        return HFConfig(_write_own(config), TINSMITH_MODEL_TYPE, reason)
    mixer = config.layers[0].mixer
    assert isinstance(mixer, GQA | MLA), "others are refused above"
    side = _SIDES[type(mixer)]
    kind = side.kind_of(config)
    data = {
        "architectures": [side.FAMILIES[kind].architecture],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": moe.intermediate_size(config),
        "num_hidden_layers": config.depth,
        "num_attention_heads": mixer.heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.dropout.attention,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    data |= side.write_keys(kind, config)
    if (
        config.trainable != ALL_PARAMETERS
    ):  # made to be trained, so nothing that says how may be lost
        data[TRAINABLE_KEY] = list(config.trainable)
        if _feeds(config_from_hf(data)) != _feeds(config):
            return HFConfig(
                _write_own(config), TINSMITH_MODEL_TYPE, "no stock class says how it is trained"
            )
    return HFConfig(data, kind)


def _feeds(config: ModelConfig) -> list[FeedForwardConfig]:
    return [layer.feed_forward for layer in config.layers]


def _write_own(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["TinsmithForCausalLM"],
        "model_type": TINSMITH_MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings,
        TINSMITH_MODEL_TYPE: {"schema": SCHEMA_VERSION, "model": to_plain(config)},
    }


def why_not_stock(config: ModelConfig) -> str | None:
    """None where a stock family computes exactly this model, else what stands against it."""
    for key, value, wanted in (
        ("norm", config.norm, "rms"),
        ("positions", config.positions, "rope"),
        ("residual", config.residual.kind, Plain().kind),
    ):
        if value != wanted:
            return f"{key} is {value}"
    first = type(config.layers[0].mixer)
    for index, layer in enumerate(config.layers):
        feeds = _FEEDS.get(type(layer.mixer))
        if feeds is None:
            return f"layer {index} has mixer {layer.mixer.kind}"
        if not isinstance(layer.feed_forward, feeds):
            return f"layer {index} has feed_forward {layer.feed_forward.kind}"
        if type(layer.mixer) is not first:
            return f"layer {index} is of another shape than layer 0"
    return _SIDES[first].problem(config)

"""Translate `ModelConfig` to `config.json`.

A stock family is used if its class computes exactly the same function; otherwise the folder has
`model_type: tinsmith` and Tinsmith's own description of the model.
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

_FAMILY_MODULES = {GQA: llama, MLA: deepseek}
_STOCK_FEED_FORWARDS = {GQA: (SwiGLU, TopKMoE), MLA: (SwiGLU, DeepSeekMoE)}


class HFConfig(NamedTuple):
    """A `config.json`: its content, its `model_type`, and why it is not a stock family."""

    data: dict[str, Any]
    family: str
    reason: str | None = None


def config_to_hf(config: ModelConfig) -> HFConfig:
    """Return the `config.json` of the stock family that computes exactly this model, or Tinsmith's
    own.

    Settings that act in training only (dropout except attention dropout, the attention backend) do
    not prevent a stock family.
    """
    reason = why_not_stock(config)
    if reason is not None:
        return HFConfig(_write_tinsmith(config), TINSMITH_MODEL_TYPE, reason)
    mixer = config.layers[0].mixer
    assert isinstance(mixer, GQA | MLA), "others are refused above"
    module = _FAMILY_MODULES[type(mixer)]
    kind = module.kind_of(config)
    data = {
        "architectures": [module.FAMILIES[kind].architecture],
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
    data |= module.write_keys(kind, config)
    if config.trainable != ALL_PARAMETERS:  # to be trained further: keep the training settings
        data[TRAINABLE_KEY] = list(config.trainable)
        if _feed_forwards(config_from_hf(data)) != _feed_forwards(config):
            return HFConfig(
                _write_tinsmith(config),
                TINSMITH_MODEL_TYPE,
                "no stock class stores its training settings",
            )
    return HFConfig(data, kind)


def _feed_forwards(config: ModelConfig) -> list[FeedForwardConfig]:
    return [layer.feed_forward for layer in config.layers]


def _write_tinsmith(config: ModelConfig) -> dict[str, Any]:
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
    """Return the reason why no stock family computes exactly this model, or None if one does."""
    for key, value, stock_value in (
        ("norm", config.norm, "rms"),
        ("positions", config.positions, "rope"),
        ("residual", config.residual.kind, Plain().kind),
    ):
        if value != stock_value:
            return f"{key} is {value}"
    mixer_class = type(config.layers[0].mixer)
    for index, layer in enumerate(config.layers):
        stock_classes = _STOCK_FEED_FORWARDS.get(type(layer.mixer))
        if stock_classes is None:
            return f"layer {index} has mixer {layer.mixer.kind}"
        if not isinstance(layer.feed_forward, stock_classes):
            return f"layer {index} has feed_forward {layer.feed_forward.kind}"
        if type(layer.mixer) is not mixer_class:
            return f"layer {index} is of another shape than layer 0"
    return _FAMILY_MODULES[mixer_class].problem(config)

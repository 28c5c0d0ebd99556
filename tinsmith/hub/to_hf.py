"""`ModelConfig` to `config.json`: the stock family that computes exactly the same, where there is
one. What none of them can express is written with `model_type: tinsmith` and Tinsmith's own
description inside.
"""

from dataclasses import replace
from typing import Any, NamedTuple

from tinsmith.core.parse import plain
from tinsmith.hub.from_hf import FAMILIES, FULL, OWN, SCHEMA, SLIDING
from tinsmith.hub.rope import write_rope
from tinsmith.nn.config import Layer, ModelConfig
from tinsmith.nn.feedforwards.dense import SwiGLU
from tinsmith.nn.mixers.gqa import GQA
from tinsmith.nn.residuals.plain import Plain


class Translation(NamedTuple):
    """A `config.json`: its content, whose class opens it, and why it is not a stock one."""

    data: dict[str, Any]
    family: str
    reason: str | None = None


def config_to_hf(config: ModelConfig) -> Translation:
    """A `config.json` of the stock family that computes exactly this model, or Tinsmith's own.

    What only acts in training (dropout but for attention's, how attention is computed) is no reason
    against a stock family.
    """
    reason = why_not_stock(config)
    if reason is not None:
        return Translation(_write_own(config), OWN, reason)
    mixer, feed = _attention(config), config.layers[0].feed_forward
    if mixer.qk_norm:
        kind = "qwen3"
    elif mixer.bias == "qkv":
        kind = "qwen2"
    else:
        windowed = mixer.window is not None
        kind = "mistral" if windowed or config.dim % mixer.heads else "llama"
    data = {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": feed.hidden,
        "num_hidden_layers": config.depth,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.groups,
        "head_dim": mixer.width(config.dim),
        "hidden_act": "silu",
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.dropout.attention,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    return Translation(data | write_rope(config.rope) | _written(kind, config), kind)


def _written(kind: str, config: ModelConfig) -> dict[str, Any]:
    """The keys that only some of the families have."""
    mixer, feed = _attention(config), config.layers[0].feed_forward
    windows = [layer.mixer.window for layer in config.layers]
    width = max((window for window in windows if window is not None), default=None)
    data: dict[str, Any] = {}
    if kind == "llama":
        data["mlp_bias"] = feed.bias
    if kind in ("llama", "qwen3"):
        data["attention_bias"] = mixer.bias == "all"
    if kind == "mistral":
        data["sliding_window"] = width
    if FAMILIES[kind].layer_types:
        first = next((i for i, window in enumerate(windows) if window is not None), config.depth)
        data |= {
            "use_sliding_window": width is not None,
            "sliding_window": width,
            "max_window_layers": first,
            "layer_types": [FULL if window is None else SLIDING for window in windows],
        }
    return data


def _write_own(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["TinsmithForCausalLM"],
        "model_type": OWN,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "max_position_embeddings": config.max_context,
        "tie_word_embeddings": config.tie_embeddings,
        OWN: {"schema": SCHEMA, "model": plain(config)},
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
    layers = config.layers
    for index, layer in enumerate(layers):
        problem = _strange(layer)
        if problem is not None:
            return f"layer {index} has {problem}"
        if _alike(layer, config.dim) != _alike(layers[0], config.dim):
            return f"layer {index} is of another shape than layer 0"
    return _no_family(config)


def _strange(layer: Layer) -> str | None:
    mixer, feed = layer.mixer, layer.feed_forward
    if not isinstance(mixer, GQA):
        return f"mixer {mixer.kind}"
    if not isinstance(feed, SwiGLU):
        return f"feed_forward {feed.kind}"
    for name, present in (("sinks", mixer.sinks), ("value_residual", mixer.value_residual)):
        if present:
            return name
    return None if mixer.rope else "rope: false"


def _alike(layer: Layer, dim: int) -> Layer:
    """The layer with its window set aside and its derived sizes written out."""
    mixer = layer.mixer
    same = replace(mixer, kv_heads=mixer.groups, head_dim=mixer.width(dim), window=None)
    return replace(layer, mixer=same)


def _attention(config: ModelConfig) -> GQA:
    """The mixer of a model whose layers are those of a stock family, but for its window."""
    mixer = config.layers[0].mixer
    assert isinstance(mixer, GQA)
    return mixer


def _no_family(config: ModelConfig) -> str | None:
    """What no family has, of a model whose layers are alike but for their windows."""
    mixer, feed = _attention(config), config.layers[0].feed_forward
    windows = {layer.mixer.window for layer in config.layers}
    if len(windows - {None}) > 1:
        return f"windows of {len(windows - {None})} widths"
    plain_llama = not mixer.qk_norm and mixer.bias != "qkv"
    if feed.bias and not plain_llama:
        return "feed_forward.bias beside q/k norms or q/k/v biases"
    if mixer.qk_norm:
        return "q/k norms beside q/k/v biases" if mixer.bias == "qkv" else None
    if mixer.bias == "qkv":
        return None
    if len(windows) > 1:
        return "windows on some layers only, without q/k norms or q/k/v biases"
    biased = mixer.bias == "all" or feed.bias
    if biased and windows != {None}:
        return "windows beside biases"
    if biased and config.dim % mixer.heads:
        return f"biases, and dim={config.dim} is no multiple of heads={mixer.heads}"
    return None

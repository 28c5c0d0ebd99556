"""Translate configs with grouped-query attention in every layer.

Llama, Mistral, Qwen2 and Qwen3 have SwiGLU; Mixtral and Qwen3-MoE have experts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tinsmith.hub.families import moe
from tinsmith.hub.families.rope import read_scaling, write_rope
from tinsmith.hub.keys import ConfigReader
from tinsmith.nn.config import Layer, ModelConfig
from tinsmith.nn.feedforwards.dense import SwiGLU
from tinsmith.nn.feedforwards.topk import TopKMoE
from tinsmith.nn.mixers.gqa import GQA

__all__ = ["FAMILIES", "kind_of", "problem", "read_layers", "read_scaling", "write_keys"]


class LlamaFamily(NamedTuple):
    """A stock family: its class, and the defaults of transformers for keys missing in
    `config.json`.
    """

    architecture: str
    max_seq_len: int
    kv_heads: int | None = None
    head_dim: int | None = None
    layer_types: bool = False
    """Whether `layer_types` may give single layers a window; otherwise all or none have one."""
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6


FAMILIES = {
    "llama": LlamaFamily("LlamaForCausalLM", 2048),
    "mistral": LlamaFamily("MistralForCausalLM", 131072, kv_heads=8),
    "qwen2": LlamaFamily("Qwen2ForCausalLM", 32768, kv_heads=32, layer_types=True),
    "qwen3": LlamaFamily("Qwen3ForCausalLM", 32768, kv_heads=32, head_dim=128, layer_types=True),
    "qwen3_moe": LlamaFamily("Qwen3MoeForCausalLM", 32768, kv_heads=4),
    "mixtral": LlamaFamily("MixtralForCausalLM", 131072, kv_heads=8, rope_theta=1e6, norm_eps=1e-5),
}
FULL, SLIDING = "full_attention", "sliding_attention"


def read_layers(kind: str, keys: ConfigReader) -> tuple[Sequence[Layer], Sequence[Layer]]:
    """Read the layers: the first ones (none here) and the pattern that is repeated."""
    family = FAMILIES[kind]
    heads, depth = keys.positive_int("num_attention_heads"), keys.positive_int("num_hidden_layers")
    kv_heads = keys.optional_positive_int("num_key_value_heads", family.kv_heads)
    if heads % (kv_heads or heads):
        keys.fail("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads={heads}")
    has_bias = keys.flag("attention_bias", False) and kind in ("llama", "qwen3", "qwen3_moe")
    mixer = GQA(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=keys.optional_positive_int("head_dim", family.head_dim),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        bias="qkv" if kind == "qwen2" else "all" if has_bias else "none",
    )
    layers = [
        Layer(mixer=replace(mixer, window=window), feed_forward=feed)
        for window, feed in zip(
            _windows(kind, keys, depth), _feed_forwards(kind, keys, depth), strict=True
        )
    ]
    return (), _period(layers)


def _feed_forwards(kind: str, keys: ConfigReader, depth: int) -> Sequence[moe.StockFeedForward]:
    """Read the feed-forward of every layer."""
    if kind == "qwen3_moe":
        return moe.read_qwen3(keys, depth)
    if kind == "mixtral":
        return [moe.read_mixtral(keys)] * depth
    has_bias = keys.flag("mlp_bias", False) and kind == "llama"
    return [SwiGLU(hidden_dim=keys.positive_int("intermediate_size"), bias=has_bias)] * depth


def _windows(kind: str, keys: ConfigReader, depth: int) -> list[int | None]:
    """Read the attention window of every layer."""
    if kind == "llama":
        width, sliding = None, [False] * depth
    elif kind in ("mistral", "mixtral"):
        width = keys.optional_positive_int("sliding_window", 4096 if kind == "mistral" else None)
        sliding = [width is not None] * depth
    elif kind == "qwen3_moe":
        use_window = keys.flag("use_sliding_window", False)
        width = keys.optional_positive_int("sliding_window", 4096) if use_window else None
        sliding = [width is not None] * depth
    else:
        use_window = keys.flag("use_sliding_window", False)
        width = keys.optional_positive_int("sliding_window", 4096) if use_window else None
        first_sliding = keys.data.get("max_window_layers", 28)
        if type(first_sliding) is not int:
            keys.fail("max_window_layers", f"must be a whole number (got {first_sliding!r:.60})")
        sliding = [width is not None and layer >= first_sliding for layer in range(depth)]
    types = keys.data.get("layer_types")
    if types is not None:
        sliding = _read_layer_types(types, sliding, keys, FAMILIES[kind].layer_types)
        if width is None and any(sliding):
            keys.fail("layer_types", f"names {SLIDING!r}, but no sliding_window is in use")
    return [width if is_sliding else None for is_sliding in sliding]


def _read_layer_types(
    types: Any, default: list[bool], keys: ConfigReader, per_layer: bool
) -> list[bool]:
    """Return `layer_types` as one bool for each layer: whether it has a window.

    transformers' Llama and Mistral ignore `layer_types`; for such families (not `per_layer`) it
    must agree with the default.
    """
    if not isinstance(types, list) or len(types) != len(default):
        keys.fail("layer_types", f"must be a list of {len(default)} names, one a layer")
    for name in types:
        if name not in (FULL, SLIDING):
            keys.fail("layer_types", f"{name!r:.60} is not one of {FULL}, {SLIDING}")
    sliding = [name == SLIDING for name in types]
    if sliding != default and not per_layer:
        keys.fail("layer_types", f"a {keys.data['model_type']} model cannot differ by layer")
    return sliding


def _period(layers: list[Layer]) -> list[Layer]:
    """Return the shortest pattern that gives `layers` when it is repeated."""
    for length in range(1, len(layers)):
        if layers[length:] == layers[:-length]:
            return layers[:length]
    return layers


def kind_of(config: ModelConfig) -> str:
    """Return the `model_type` for a model without `problem`."""
    mixer = _mixers(config)[0]
    if _moe_layer(config) is not None:
        return "qwen3_moe" if mixer.qk_norm else "mixtral"
    if mixer.qk_norm:
        return "qwen3"
    if mixer.bias == "qkv":
        return "qwen2"
    return "mistral" if mixer.window is not None or config.dim % mixer.heads else "llama"


def write_keys(kind: str, config: ModelConfig) -> dict[str, Any]:
    """Return the keys of attention, and the keys that only some families have."""
    mixers, moe_layer = _mixers(config), _moe_layer(config)
    mixer, windows = mixers[0], [mixer.window for mixer in mixers]
    width = max((window for window in windows if window is not None), default=None)
    data: dict[str, Any] = write_rope(config.rope)
    data |= {
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.resolve_head_dim(config.dim),
    }
    if kind == "llama":
        data["mlp_bias"] = _has_mlp_bias(config)
    if kind in ("llama", "qwen3", "qwen3_moe"):
        data["attention_bias"] = mixer.bias == "all"
    if kind in ("mistral", "mixtral", "qwen3_moe"):
        data["sliding_window"] = width
    if moe_layer is not None and kind == "mixtral":
        data |= moe.write_mixtral(moe_layer)
    if moe_layer is not None and kind == "qwen3_moe":
        data |= {"use_sliding_window": width is not None} | moe.write_qwen3(moe_layer, config)
    if FAMILIES[kind].layer_types:
        data |= {
            "use_sliding_window": width is not None,
            "sliding_window": width,
            "layer_types": [FULL if window is None else SLIDING for window in windows],
        }
        if width is not None:
            data["max_window_layers"] = windows.index(width)
    return data


def problem(config: ModelConfig) -> str | None:
    """Return a property that none of these families has, or None.

    The model has grouped-query attention with SwiGLU or `topk_moe` in every layer.
    """
    mixers = _mixers(config)
    for index, mixer in enumerate(mixers):
        for name in ("sinks", "value_residual"):
            if getattr(mixer, name):
                return f"layer {index} has {name}"
        if not mixer.rope:
            return f"layer {index} has rope: false"
        if _without_window(config, index) != _without_window(config, 0):
            return f"layer {index} is of another shape than layer 0"
    moe_layer = _moe_layer(config)
    return (
        moe.layer_mismatch(config)
        or (_dense_problem(config) if moe_layer is None else moe.problem(moe_layer))
        or (None if moe_layer is None else _moe_problem(config, moe_layer))
    )


def _moe_layer(config: ModelConfig) -> TopKMoE | None:
    """Return the experts of the first layer that has experts, or None."""
    feeds = (layer.feed_forward for layer in config.layers)
    return next((feed for feed in feeds if isinstance(feed, TopKMoE)), None)


def _has_mlp_bias(config: ModelConfig) -> bool:
    """Whether the dense feed-forwards have biases."""
    feeds = (layer.feed_forward for layer in config.layers)
    return any(isinstance(feed, SwiGLU) and feed.bias for feed in feeds)


def _mixers(config: ModelConfig) -> list[GQA]:
    return [layer.mixer for layer in config.layers if isinstance(layer.mixer, GQA)]


def _without_window(config: ModelConfig, index: int) -> GQA:
    """Return a layer's mixer without its window and with its default sizes resolved."""
    mixer = _mixers(config)[index]
    return replace(
        mixer, kv_heads=mixer.num_kv_heads, head_dim=mixer.resolve_head_dim(config.dim), window=None
    )


def _dense_problem(config: ModelConfig) -> str | None:
    """Return a property that no dense family has; the layers differ only in their windows."""
    mixers, has_mlp_bias = _mixers(config), _has_mlp_bias(config)
    mixer, windows = mixers[0], {mixer.window for mixer in mixers}
    if len(windows - {None}) > 1:
        return f"windows of {len(windows - {None})} widths"
    is_llama = not mixer.qk_norm and mixer.bias != "qkv"
    if has_mlp_bias and not is_llama:
        return "feed_forward.bias beside q/k norms or q/k/v biases"
    if mixer.qk_norm:
        return "q/k norms beside q/k/v biases" if mixer.bias == "qkv" else None
    if mixer.bias == "qkv":
        return None
    if len(windows) > 1:
        return "windows on some layers only, without q/k norms or q/k/v biases"
    has_bias = mixer.bias == "all" or has_mlp_bias
    if has_bias and windows != {None}:
        return "windows beside biases"
    if has_bias and config.dim % mixer.heads:
        return f"biases, and dim={config.dim} is no multiple of heads={mixer.heads}"
    return None


def _moe_problem(config: ModelConfig, moe_layer: TopKMoE) -> str | None:
    """Return a property that neither Qwen3-MoE nor Mixtral has, of a model with experts."""
    mixer = _mixers(config)[0]
    if len({mixer.window for mixer in _mixers(config)}) > 1:
        return "windows on some layers only, beside experts"
    if _has_mlp_bias(config):
        return "feed_forward.bias beside experts"
    if mixer.qk_norm:
        return "q/k norms beside q/k/v biases" if mixer.bias == "qkv" else None
    if mixer.bias != "none":
        return "biases beside experts, without q/k norms"
    if not all(isinstance(layer.feed_forward, TopKMoE) for layer in config.layers):
        return "dense layers beside experts, without q/k norms"
    if not moe_layer.norm_topk_prob or moe_layer.top_k == 1:
        return "raw weights of experts, without q/k norms"
    return None

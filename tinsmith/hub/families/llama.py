"""Llama, Mistral, Qwen2 and Qwen3: grouped-query attention and SwiGLU in every layer; Mixtral and
Qwen3-MoE: experts.
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
    """A stock family: its class, and what transformers assumes where `config.json` is silent."""

    architecture: str
    max_seq_len: int
    kv_heads: int | None = None
    head_dim: int | None = None
    layer_types: bool = False
    """Each layer says whether it has the window; otherwise all or none have it."""
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
    """The first layers and the pattern of a family with grouped-query attention."""
    family = FAMILIES[kind]
    heads, depth = keys.positive_int("num_attention_heads"), keys.positive_int("num_hidden_layers")
    kv_heads = keys.optional_positive_int("num_key_value_heads", family.kv_heads)
    if heads % (kv_heads or heads):
        keys.fail("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads={heads}")
    biased = keys.flag("attention_bias", False) and kind in ("llama", "qwen3", "qwen3_moe")
    mixer = GQA(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=keys.optional_positive_int("head_dim", family.head_dim),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        bias="qkv" if kind == "qwen2" else "all" if biased else "none",
    )
    layers = [
        Layer(mixer=replace(mixer, window=window), feed_forward=feed)
        for window, feed in zip(_windows(kind, keys, depth), _feeds(kind, keys, depth), strict=True)
    ]
    return (), _period(layers)


def _feeds(kind: str, keys: ConfigReader, depth: int) -> Sequence[moe.StockFeedForward]:
    """The feed-forward of every layer."""
    if kind == "qwen3_moe":
        return moe.read_qwen3(keys, depth)
    if kind == "mixtral":
        return [moe.read_mixtral(keys)] * depth
    biased = keys.flag("mlp_bias", False) and kind == "llama"
    return [SwiGLU(hidden_dim=keys.positive_int("intermediate_size"), bias=biased)] * depth


def _windows(kind: str, keys: ConfigReader, depth: int) -> list[int | None]:
    """The window of every layer."""
    if kind == "llama":
        width, sliding = None, [False] * depth
    elif kind in ("mistral", "mixtral"):
        width = keys.optional_positive_int("sliding_window", 4096 if kind == "mistral" else None)
        sliding = [width is not None] * depth
    elif kind == "qwen3_moe":
        used = keys.flag("use_sliding_window", False)
        width = keys.optional_positive_int("sliding_window", 4096) if used else None
        sliding = [width is not None] * depth
    else:
        used = keys.flag("use_sliding_window", False)
        width = keys.optional_positive_int("sliding_window", 4096) if used else None
        begin = keys.data.get("max_window_layers", 28)
        if type(begin) is not int:
            keys.fail("max_window_layers", f"must be a whole number (got {begin!r:.60})")
        sliding = [width is not None and layer >= begin for layer in range(depth)]
    types = keys.data.get("layer_types")
    if types is not None:
        sliding = _reported(types, sliding, keys, FAMILIES[kind].layer_types)
        if width is None and any(sliding):
            keys.fail("layer_types", f"names {SLIDING!r}, but no sliding_window is in use")
    return [width if slides else None for slides in sliding]


def _reported(types: Any, default: list[bool], keys: ConfigReader, free: bool) -> list[bool]:
    """`layer_types` as one bool a layer. transformers' Llama and Mistral do not read it, so there
    it must not say anything new.
    """
    if not isinstance(types, list) or len(types) != len(default):
        keys.fail("layer_types", f"must be a list of {len(default)} names, one a layer")
    for name in types:
        if name not in (FULL, SLIDING):
            keys.fail("layer_types", f"{name!r:.60} is not one of {FULL}, {SLIDING}")
    reported = [name == SLIDING for name in types]
    if reported != default and not free:
        keys.fail("layer_types", f"a {keys.data['model_type']} model cannot differ by layer")
    return reported


def _period(layers: list[Layer]) -> list[Layer]:
    """The shortest pattern that gives `layers` when it is tiled."""
    for length in range(1, len(layers)):
        if layers[length:] == layers[:-length]:
            return layers[:length]
    return layers


def kind_of(config: ModelConfig) -> str:
    """The family that a model without `problem` is written as."""
    mixer = _mixers(config)[0]
    if _routed(config) is not None:
        return "qwen3_moe" if mixer.qk_norm else "mixtral"
    if mixer.qk_norm:
        return "qwen3"
    if mixer.bias == "qkv":
        return "qwen2"
    return "mistral" if mixer.window is not None or config.dim % mixer.heads else "llama"


def write_keys(kind: str, config: ModelConfig) -> dict[str, Any]:
    """The keys of grouped-query attention, and those that only some of the families have."""
    mixers, routed = _mixers(config), _routed(config)
    mixer, windows = mixers[0], [mixer.window for mixer in mixers]
    width = max((window for window in windows if window is not None), default=None)
    data: dict[str, Any] = write_rope(config.rope)
    data |= {
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.resolve_head_dim(config.dim),
    }
    if kind == "llama":
        data["mlp_bias"] = _biased(config)
    if kind in ("llama", "qwen3", "qwen3_moe"):
        data["attention_bias"] = mixer.bias == "all"
    if kind in ("mistral", "mixtral", "qwen3_moe"):
        data["sliding_window"] = width
    if routed is not None and kind == "mixtral":
        data |= moe.write_mixtral(routed)
    if routed is not None and kind == "qwen3_moe":
        data |= {"use_sliding_window": width is not None} | moe.write_qwen3(routed, config)
    if FAMILIES[kind].layer_types:
        first = next((i for i, window in enumerate(windows) if window is not None), config.depth)
        data |= {
            "use_sliding_window": width is not None,
            "sliding_window": width,
            "max_window_layers": first,
            "layer_types": [FULL if window is None else SLIDING for window in windows],
        }
    return data


def problem(config: ModelConfig) -> str | None:
    """What stands against all these families, of a model of grouped-query attention with SwiGLU
    or `topk_moe`.
    """
    mixers = _mixers(config)
    for index, mixer in enumerate(mixers):
        for name in ("sinks", "value_residual"):
            if getattr(mixer, name):
                return f"layer {index} has {name}"
        if not mixer.rope:
            return f"layer {index} has rope: false"
        if _alike(config, index) != _alike(config, 0):
            return f"layer {index} is of another shape than layer 0"
    routed = _routed(config)
    return (
        moe.layer_mismatch(config)
        or (_no_family(config) if routed is None else moe.problem(routed))
        or (None if routed is None else _no_routed_family(config, routed))
    )


def _routed(config: ModelConfig) -> TopKMoE | None:
    """The experts that some or all layers have."""
    feeds = (layer.feed_forward for layer in config.layers)
    return next((feed for feed in feeds if isinstance(feed, TopKMoE)), None)


def _biased(config: ModelConfig) -> bool:
    """Whether the dense feed-forwards have biases."""
    feeds = (layer.feed_forward for layer in config.layers)
    return any(isinstance(feed, SwiGLU) and feed.bias for feed in feeds)


def _mixers(config: ModelConfig) -> list[GQA]:
    return [layer.mixer for layer in config.layers if isinstance(layer.mixer, GQA)]


def _alike(config: ModelConfig, index: int) -> GQA:
    """A layer's mixer with its window set aside and its derived sizes written out."""
    mixer = _mixers(config)[index]
    return replace(
        mixer, kv_heads=mixer.num_kv_heads, head_dim=mixer.resolve_head_dim(config.dim), window=None
    )


def _no_family(config: ModelConfig) -> str | None:
    """What no family has, of a model whose layers are alike but for their windows."""
    mixers, feed_biased = _mixers(config), _biased(config)
    mixer, windows = mixers[0], {mixer.window for mixer in mixers}
    if len(windows - {None}) > 1:
        return f"windows of {len(windows - {None})} widths"
    plain_llama = not mixer.qk_norm and mixer.bias != "qkv"
    if feed_biased and not plain_llama:
        return "feed_forward.bias beside q/k norms or q/k/v biases"
    if mixer.qk_norm:
        return "q/k norms beside q/k/v biases" if mixer.bias == "qkv" else None
    if mixer.bias == "qkv":
        return None
    if len(windows) > 1:
        return "windows on some layers only, without q/k norms or q/k/v biases"
    biased = mixer.bias == "all" or feed_biased
    if biased and windows != {None}:
        return "windows beside biases"
    if biased and config.dim % mixer.heads:
        return f"biases, and dim={config.dim} is no multiple of heads={mixer.heads}"
    return None


def _no_routed_family(config: ModelConfig, routed: TopKMoE) -> str | None:
    """What neither Qwen3-MoE nor Mixtral has, of a model with experts."""
    mixer = _mixers(config)[0]
    if len({mixer.window for mixer in _mixers(config)}) > 1:
        return "windows on some layers only, beside experts"
    if _biased(config):
        return "feed_forward.bias beside experts"
    if mixer.qk_norm:
        return "q/k norms beside q/k/v biases" if mixer.bias == "qkv" else None
    if mixer.bias != "none":
        return "biases beside experts, without q/k norms"
    if not all(isinstance(layer.feed_forward, TopKMoE) for layer in config.layers):
        return "dense layers beside experts, without q/k norms"
    if not routed.norm_topk_prob or routed.top_k == 1:
        return "raw weights of experts, without q/k norms"
    return None

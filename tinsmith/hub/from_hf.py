"""`config.json` to `ModelConfig`: Llama, Mistral, Qwen2, Qwen3, and Tinsmith's own."""

from dataclasses import replace
from typing import Any, NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.core.parse import nearest
from tinsmith.hub.keys import Keys
from tinsmith.hub.rope import read_rope
from tinsmith.nn.config import Dropout, Layer, ModelConfig
from tinsmith.nn.feedforwards.dense import SwiGLU
from tinsmith.nn.mixers.gqa import GQA

OWN = "tinsmith"
SCHEMA = 1


class Family(NamedTuple):
    """A stock family: its class, and what transformers assumes where `config.json` is silent."""

    architecture: str
    max_context: int
    kv_heads: int | None = None
    head_dim: int | None = None
    layer_types: bool = False
    """Each layer says whether it has the window; otherwise all or none have it."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM", 2048),
    "mistral": Family("MistralForCausalLM", 131072, kv_heads=8),
    "qwen2": Family("Qwen2ForCausalLM", 32768, kv_heads=32, layer_types=True),
    "qwen3": Family("Qwen3ForCausalLM", 32768, kv_heads=32, head_dim=128, layer_types=True),
}
FULL, SLIDING = "full_attention", "sliding_attention"
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "quantization_config": (),
    "compression_config": (),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
"""Keys that would change what is computed, and the values that do not."""


def config_from_hf(data: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """The model that a parsed `config.json` describes, where Tinsmith can build exactly that.

    UserError, with the key, for everything that it cannot build and for values of no sense.
    """
    kind = data.get("model_type")
    if kind == OWN:
        return _own(data, where)
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = [*FAMILIES, OWN]
        hint = nearest(kind, known) if isinstance(kind, str) else ""
        raise UserError(f"{where}: model_type: {kind!r:.60} is not one of {', '.join(known)}{hint}")
    keys = Keys(data, where)
    for key, allowed in _ONLY.items():
        keys.only(key, allowed)
    try:
        return _stock(kind, keys)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _own(data: dict[str, Any], where: str) -> ModelConfig:
    inner = data.get(OWN)
    if not isinstance(inner, dict) or inner.get("schema") != SCHEMA:
        schema = inner.get("schema") if isinstance(inner, dict) else None
        raise UserError(f"{where}: {OWN}.schema: {schema!r:.60}, and this version reads {SCHEMA}")
    place, model = f"{where}: {OWN}.model", inner.get("model")
    if not isinstance(model, dict):
        raise UserError(f"{place}: must be an object (got {model!r:.60})")
    for key in ("vocab_size", "dim", "depth"):
        Keys(model, place).size(key)
    return ModelConfig.from_dict(model, place)


def _stock(kind: str, keys: Keys) -> ModelConfig:
    family = FAMILIES[kind]
    heads, depth = keys.size("num_attention_heads"), keys.size("num_hidden_layers")
    kv_heads = keys.optional_size("num_key_value_heads", family.kv_heads)
    if heads % (kv_heads or heads):
        keys.fail("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads={heads}")
    biased = keys.flag("attention_bias", False) and kind in ("llama", "qwen3")
    mixer = GQA(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=keys.optional_size("head_dim", family.head_dim),
        qk_norm=kind == "qwen3",
        bias="qkv" if kind == "qwen2" else "all" if biased else "none",
    )
    feed = SwiGLU(
        hidden=keys.size("intermediate_size"),
        bias=keys.flag("mlp_bias", False) and kind == "llama",
    )
    windows = _period(_windows(kind, keys, depth))
    pattern = [Layer(mixer=replace(mixer, window=window), feed_forward=feed) for window in windows]
    context = keys.size("max_position_embeddings", family.max_context)
    return ModelConfig(
        vocab_size=keys.size("vocab_size"),
        dim=keys.size("hidden_size"),
        depth=depth,
        pattern=tuple(pattern),
        max_context=context,
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope=read_rope(keys.data, context, keys.where),
        dropout=Dropout(attention=keys.number("attention_dropout", 0.0, above=-1)),
    )


def _windows(kind: str, keys: Keys, depth: int) -> list[int | None]:
    """The window of every layer."""
    if kind == "llama":
        width, sliding = None, [False] * depth
    elif kind == "mistral":
        width = keys.optional_size("sliding_window", 4096)
        sliding = [width is not None] * depth
    else:
        used = keys.flag("use_sliding_window", False)
        width = keys.optional_size("sliding_window", 4096) if used else None
        begin = keys.data.get("max_window_layers", 28)
        if type(begin) is not int:
            keys.fail("max_window_layers", f"must be a whole number (got {begin!r:.60})")
        sliding = [width is not None and layer >= begin for layer in range(depth)]
    types = keys.data.get("layer_types")
    if types is not None:
        sliding = _told(types, sliding, keys, FAMILIES[kind].layer_types)
        if width is None and any(sliding):
            keys.fail("layer_types", f"names {SLIDING!r}, but no sliding_window is in use")
    return [width if slides else None for slides in sliding]


def _told(types: Any, default: list[bool], keys: Keys, free: bool) -> list[bool]:
    """`layer_types` as one bool a layer. transformers' Llama and Mistral do not read it, so there
    it must not say anything new.
    """
    if not isinstance(types, list) or len(types) != len(default):
        keys.fail("layer_types", f"must be a list of {len(default)} names, one a layer")
    for name in types:
        if name not in (FULL, SLIDING):
            keys.fail("layer_types", f"{name!r:.60} is not one of {FULL}, {SLIDING}")
    told = [name == SLIDING for name in types]
    if told != default and not free:
        keys.fail("layer_types", f"a {keys.data['model_type']} model cannot differ by layer")
    return told


def _period(windows: list[int | None]) -> list[int | None]:
    """The shortest pattern that gives `windows` when it is tiled."""
    for length in range(1, len(windows)):
        if windows[length:] == windows[:-length]:
            return windows[:length]
    return windows

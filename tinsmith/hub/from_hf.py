"""Translate `config.json` to `ModelConfig`.

Reads Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, DeepSeek-V2 (dense) and V3, and Tinsmith's
own `model_type: tinsmith`.
"""

from typing import Any

from tinsmith.core.errors import UserError
from tinsmith.core.parse import did_you_mean
from tinsmith.hub.families import deepseek, llama
from tinsmith.hub.families.rope import read_rope
from tinsmith.hub.keys import ConfigReader
from tinsmith.nn.config import Dropout, ModelConfig
from tinsmith.nn.parameters import ALL_PARAMETERS

TINSMITH_MODEL_TYPE = "tinsmith"
SCHEMA_VERSION = 1
TRAINABLE_KEY = "tinsmith_trained"
"""Tinsmith's key in the `config.json` of a stock family: patterns of the trainable parameters."""
FAMILY_MODULES = (llama, deepseek)
"""One module for each kind of attention; it reads and writes the keys of its families."""
MODULE_BY_FAMILY = {kind: module for module in FAMILY_MODULES for kind in module.FAMILIES}

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
"""Keys that could change the computation, and the values at which they do not."""


def config_from_hf(data: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Return the model config that a parsed `config.json` describes.

    UserError names the key if Tinsmith cannot build exactly that model, or if a value is invalid.
    """
    kind = data.get("model_type")
    if kind == TINSMITH_MODEL_TYPE:
        return _read_tinsmith(data, where)
    if not isinstance(kind, str) or kind not in MODULE_BY_FAMILY:
        known = [*MODULE_BY_FAMILY, TINSMITH_MODEL_TYPE]
        hint = did_you_mean(kind, known) if isinstance(kind, str) else ""
        raise UserError(f"{where}: model_type: {kind!r:.60} is not one of {', '.join(known)}{hint}")
    keys = ConfigReader(data, where)
    for key, allowed in _ONLY.items():
        keys.check_allowed(key, allowed)
    try:
        return _read_stock(kind, keys)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _read_tinsmith(data: dict[str, Any], where: str) -> ModelConfig:
    inner = data.get(TINSMITH_MODEL_TYPE)
    if not isinstance(inner, dict) or inner.get("schema") != SCHEMA_VERSION:
        schema = inner.get("schema") if isinstance(inner, dict) else None
        raise UserError(
            f"{where}: {TINSMITH_MODEL_TYPE}.schema: {schema!r:.60}, and this version reads "
            f"{SCHEMA_VERSION}"
        )
    model_where, model = f"{where}: {TINSMITH_MODEL_TYPE}.model", inner.get("model")
    if not isinstance(model, dict):
        raise UserError(f"{model_where}: must be an object (got {model!r:.60})")
    for key in ("vocab_size", "dim", "depth"):
        ConfigReader(model, model_where).positive_int(key)
    return ModelConfig.from_dict(model, model_where)


def _read_stock(kind: str, keys: ConfigReader) -> ModelConfig:
    module = MODULE_BY_FAMILY[kind]
    family = module.FAMILIES[kind]
    first, pattern = module.read_layers(kind, keys)
    context = keys.positive_int("max_position_embeddings", family.max_seq_len)
    return ModelConfig(
        vocab_size=keys.positive_int("vocab_size"),
        dim=keys.positive_int("hidden_size"),
        depth=keys.positive_int("num_hidden_layers"),
        first=tuple(first),
        pattern=tuple(pattern),
        max_seq_len=context,
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        norm_eps=keys.number("rms_norm_eps", family.norm_eps),
        rope=read_rope(keys.data, context, keys.where, module.read_scaling, family.rope_theta),
        dropout=Dropout(attention=keys.number("attention_dropout", 0.0, above=-1)),
        trainable=_trainable(keys),
    )


def _trainable(keys: ConfigReader) -> tuple[str, ...]:
    patterns = keys.data.get(TRAINABLE_KEY, list(ALL_PARAMETERS))
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        keys.fail(TRAINABLE_KEY, f"must be a list of patterns of names (got {patterns!r:.60})")
    return tuple(patterns)

"""`config.json` to `ModelConfig`: Llama, Mistral, Qwen2, Qwen3, their kin with experts, DeepSeek,
and Tinsmith's own.
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
"""Tinsmith's own key in the `config.json` of a stock family: which tensors training may change."""
FAMILY_MODULES = (llama, deepseek)
"""Modules, one for each kind of attention, that read and write what only its families have."""
MODULE_BY_FAMILY = {kind: side for side in FAMILY_MODULES for kind in side.FAMILIES}

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
    if kind == TINSMITH_MODEL_TYPE:
        return _own(data, where)
    if not isinstance(kind, str) or kind not in MODULE_BY_FAMILY:
        known = [*MODULE_BY_FAMILY, TINSMITH_MODEL_TYPE]
        hint = did_you_mean(kind, known) if isinstance(kind, str) else ""
        raise UserError(f"{where}: model_type: {kind!r:.60} is not one of {', '.join(known)}{hint}")
    keys = ConfigReader(data, where)
    for key, allowed in _ONLY.items():
        keys.check_allowed(key, allowed)
    try:
        return _stock(kind, keys)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _own(data: dict[str, Any], where: str) -> ModelConfig:
    inner = data.get(TINSMITH_MODEL_TYPE)
    if not isinstance(inner, dict) or inner.get("schema") != SCHEMA_VERSION:
        schema = inner.get("schema") if isinstance(inner, dict) else None
        raise UserError(
            f"{where}: {TINSMITH_MODEL_TYPE}.schema: {schema!r:.60}, and this version reads "
            f"{SCHEMA_VERSION}"
        )
    place, model = f"{where}: {TINSMITH_MODEL_TYPE}.model", inner.get("model")
    if not isinstance(model, dict):
        raise UserError(f"{place}: must be an object (got {model!r:.60})")
    for key in ("vocab_size", "dim", "depth"):
        ConfigReader(model, place).positive_int(key)
    return ModelConfig.from_dict(model, place)


def _stock(kind: str, keys: ConfigReader) -> ModelConfig:
    side = MODULE_BY_FAMILY[kind]
    family = side.FAMILIES[kind]
    first, pattern = side.read_layers(kind, keys)
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
        rope=read_rope(keys.data, context, keys.where, side.read_scaling, family.rope_theta),
        dropout=Dropout(attention=keys.number("attention_dropout", 0.0, above=-1)),
        trainable=_trained(keys),
    )


def _trained(keys: ConfigReader) -> tuple[str, ...]:
    patterns = keys.data.get(TRAINABLE_KEY, list(ALL_PARAMETERS))
    if not isinstance(patterns, list) or not all(isinstance(each, str) for each in patterns):
        keys.fail(TRAINABLE_KEY, f"must be a list of patterns of names (got {patterns!r:.60})")
    return tuple(patterns)

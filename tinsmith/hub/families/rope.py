"""Translate RoPE scaling (linear, Llama 3, YaRN) between Hugging Face's keys and Tinsmith's.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 writes both into
`rope_parameters`; exported folders have all three.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tinsmith.core.errors import UserError
from tinsmith.core.parse import did_you_mean, parse
from tinsmith.hub.keys import ConfigReader
from tinsmith.nn.attention.rope import LinearScaling, Llama3Scaling, Rope, RopeScaling, YarnScaling
from tinsmith.nn.config import ModelConfig
from tinsmith.nn.mixers.mla import MLA

_SCALING_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
ScalingReader = Callable[[dict[str, Any], int, str], RopeScaling | None]
_COMMON_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def read_rope(
    data: dict[str, Any],
    max_seq_len: int,
    where: str,
    scaling_reader: ScalingReader | None = None,
    default_theta: float = 10000.0,
) -> Rope:
    """Read the rotary embedding of a `config.json` with a context of `max_seq_len` tokens.

    `scaling_reader` reads the scaling section; `default_theta` is the base if the file has none.
    UserError for unsupported kinds and if the file contradicts itself.
    """
    thetas = {_theta(data, where)}
    scalings: list[RopeScaling | None] = []
    for key in ("rope_scaling", "rope_parameters"):
        section, section_where = data.get(key), f"{where}: {key}"
        if section is None or section == {}:
            continue
        if not isinstance(section, dict):
            raise UserError(f"{section_where}: must be an object (got {section!r:.60})")
        thetas.add(_theta(section, section_where))
        shared = {"original_max_position_embeddings"} & data.keys()
        scalings.append(
            (scaling_reader or read_scaling)(
                section | {name: data[name] for name in shared}, max_seq_len, section_where
            )
        )
    distinct_thetas = sorted(theta for theta in thetas if theta is not None)
    if len(distinct_thetas) > 1:
        raise UserError(f"{where}: rope_theta: given twice and differently ({distinct_thetas})")
    if any(other != scalings[0] for other in scalings):
        raise UserError(f"{where}: rope_scaling: contradicts rope_parameters; remove one of them")
    theta = distinct_thetas[0] if distinct_thetas else default_theta
    return Rope(theta=theta, scaling=scalings[0] if scalings else None)


def _theta(data: dict[str, Any], where: str) -> float | None:
    keys = ConfigReader(data, where)
    keys.check_allowed("partial_rotary_factor", (1, 1.0))
    return None if data.get("rope_theta") is None else keys.number("rope_theta", above=1)


def read_scaling(data: dict[str, Any], max_seq_len: int, where: str) -> RopeScaling | None:
    """Read a scaling section in Tinsmith's keys or in Hugging Face's.

    Tinsmith: `{kind: yarn, factor, original_max_seq_len, ...}`. Hugging Face: `{rope_type: yarn,
    factor, original_max_position_embeddings, ...}`, with `max_seq_len` as the default of the
    original length.
    """
    if "kind" in data:
        return parse(RopeScaling, data, where)
    keys = ConfigReader(data, where)
    kind = data.get("rope_type") or data.get("type") or "default"
    if not isinstance(kind, str) or kind not in _SCALING_KEYS:
        keys.fail("rope_type", f"{kind!r:.60} is not one of {', '.join(_SCALING_KEYS)}")
    known = (*_SCALING_KEYS[kind], *_COMMON_KEYS)
    for key, value in data.items():
        if key not in known and value is not None and key != "original_max_position_embeddings":
            keys.fail(key, f"unknown for rope_type {kind!r}{did_you_mean(key, list(known))}")
    try:
        return None if kind == "default" else _scaling(kind, keys, max_seq_len)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _scaling(kind: str, keys: ConfigReader, context: int) -> RopeScaling:
    if kind == "linear":
        return LinearScaling(factor=keys.number("factor"))
    original = keys.positive_int("original_max_position_embeddings", context)
    if kind == "llama3":
        low = keys.number("low_freq_factor")
        return Llama3Scaling(
            factor=keys.number("factor"),
            original_max_seq_len=original,
            low_freq_factor=low,
            high_freq_factor=keys.number("high_freq_factor", above=low),
        )
    keys.check_allowed("truncate", (True,))
    factor = keys.number("factor", context / original)
    return YarnScaling(
        factor=factor,
        original_max_seq_len=original,
        beta_fast=keys.number("beta_fast", 32),
        beta_slow=keys.number("beta_slow", 1),
        attention_factor=_attention_factor(keys, factor),
    )


def _attention_factor(keys: ConfigReader, factor: float) -> float | None:
    """Return the factor of cos and sin: `attention_factor` if given, otherwise the quotient of
    DeepSeek's two `mscale` factors, otherwise None (YaRN's own).
    """
    if keys.data.get("attention_factor") is not None:
        return keys.number("attention_factor")
    mscale, mscale_all_dim = keys.optional_number("mscale"), keys.optional_number("mscale_all_dim")
    if mscale is None or mscale_all_dim is None:
        return None
    log_factor = 0.1 * math.log(max(factor, 1.0))
    return (mscale * log_factor + 1.0) / (mscale_all_dim * log_factor + 1.0)


def read_mla_scaling(data: dict[str, Any], max_seq_len: int, where: str) -> RopeScaling | None:
    """Read a scaling section for latent attention, in which only a part of a logit is rotated.

    DeepSeek multiplies the whole logit by the square of the factor from `mscale_all_dim`, and
    Tinsmith does so with its attention factor. UserError if only the rotated part would be scaled.
    """
    scaling = read_scaling(data, max_seq_len, where)
    if not isinstance(scaling, YarnScaling) or "kind" in data:
        return scaling
    keys = ConfigReader(data, where)
    if scaling.attention_scaling != 1:
        keys.fail("mscale", "must be that of mscale_all_dim, so that all of a logit is scaled")
    mscale = keys.optional_number("mscale_all_dim") or 0.0
    default = replace(scaling, attention_factor=None)
    factor = mscale * 0.1 * math.log(scaling.factor) + 1.0
    return (
        default
        if factor == default.attention_scaling
        else replace(scaling, attention_factor=factor)
    )


def write_mla_rope(rope: Rope) -> dict[str, Any]:
    """Return the RoPE keys for latent attention, with DeepSeek's `mscale` and `mscale_all_dim`."""
    data, scaling = write_rope(rope), rope.scaling
    if not isinstance(scaling, YarnScaling):
        return data
    log_factor = 0.1 * math.log(scaling.factor)
    mscale = (
        1.0
        if scaling.attention_factor is None
        else (scaling.attention_scaling - 1.0) / (log_factor or 1.0)
    )
    mla_keys: dict[str, Any] = {"attention_factor": 1.0}
    mla_keys |= (
        {"mscale": mscale, "mscale_all_dim": mscale} if scaling.attention_scaling != 1 else {}
    )
    for key in ("rope_scaling", "rope_parameters"):
        data[key] = data[key] | mla_keys
    return data


def write_rope(rope: Rope) -> dict[str, Any]:
    """Return `rope_theta`, `rope_scaling` and `rope_parameters` of a `config.json`."""
    scaling = _write_scaling(rope.scaling)
    return {
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": rope.theta} | (scaling or {"rope_type": "default"}),
    }


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    data: dict[str, Any] = {"rope_type": scaling.kind, "factor": float(scaling.factor)}
    if isinstance(scaling, LinearScaling):
        return data
    data["original_max_position_embeddings"] = scaling.original_max_seq_len
    if isinstance(scaling, Llama3Scaling):
        return data | {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    if scaling.attention_factor is not None:
        data["attention_factor"] = float(scaling.attention_factor)
    return data | {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}


def with_rope_scaling(config: ModelConfig, rope_scaling: dict[str, Any] | None) -> ModelConfig:
    """Return the config with another RoPE scaling and the longer context that it allows.

    `rope_scaling` is a section as in `read_scaling`; None changes nothing.
    """
    if rope_scaling is None:
        return config
    if not isinstance(rope_scaling, dict):
        raise UserError(f"rope_scaling: needs keys and values (got {rope_scaling!r:.60})")
    if config.positions != "rope":
        raise UserError(f"rope_scaling: this model has {config.positions} positions, not rotary")
    has_mla = any(isinstance(layer.mixer, MLA) for layer in config.layers)
    reader = read_mla_scaling if has_mla else read_scaling
    scaling = reader(rope_scaling, config.max_seq_len, "rope_scaling")
    context = config.max_seq_len
    if isinstance(scaling, LinearScaling):
        context = math.ceil(context * scaling.factor)
    elif scaling is not None:
        context = max(context, math.ceil(scaling.original_max_seq_len * scaling.factor))
    return replace(config, rope=replace(config.rope, scaling=scaling), max_seq_len=context)

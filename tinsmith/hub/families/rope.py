"""Stretched rotary positions, in Hugging Face's words and in Tinsmith's.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 writes both in one
`rope_parameters`; folders that are written here have all three.
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

_KEYS = {
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
_ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def read_rope(
    data: dict[str, Any],
    max_seq_len: int,
    where: str,
    scaling_reader: ScalingReader | None = None,
    default_theta: float = 10000.0,
) -> Rope:
    """The rotary positions of a `config.json` of `context` tokens; `read` its stretching; `theta`
    is what a silent file means.

    UserError for kinds that Tinsmith does not have, and where the file contradicts itself.
    """
    thetas = {_theta(data, where)}
    stretchings: list[RopeScaling | None] = []
    for key in ("rope_scaling", "rope_parameters"):
        inner, place = data.get(key), f"{where}: {key}"
        if inner is None or inner == {}:
            continue
        if not isinstance(inner, dict):
            raise UserError(f"{place}: must be an object (got {inner!r:.60})")
        thetas.add(_theta(inner, place))
        outer = {"original_max_position_embeddings"} & data.keys()
        stretchings.append(
            (scaling_reader or read_scaling)(
                inner | {name: data[name] for name in outer}, max_seq_len, place
            )
        )
    given = sorted(theta for theta in thetas if theta is not None)
    if len(given) > 1:
        raise UserError(f"{where}: rope_theta: given twice and differently ({given})")
    if any(other != stretchings[0] for other in stretchings):
        raise UserError(f"{where}: rope_scaling: contradicts rope_parameters; remove one of them")
    base = given[0] if given else default_theta
    return Rope(theta=base, scaling=stretchings[0] if stretchings else None)


def _theta(data: dict[str, Any], where: str) -> float | None:
    keys = ConfigReader(data, where)
    keys.check_allowed("partial_rotary_factor", (1, 1.0))
    return None if data.get("rope_theta") is None else keys.number("rope_theta", above=1)


def read_scaling(data: dict[str, Any], max_seq_len: int, where: str) -> RopeScaling | None:
    """`{kind: yarn, factor, original_max_seq_len, ...}`, or `{rope_type: yarn, factor,
    original_max_position_embeddings, ...}` as in a `config.json` of `context` tokens.
    """
    if "kind" in data:
        return parse(RopeScaling, data, where)
    keys = ConfigReader(data, where)
    kind = data.get("rope_type") or data.get("type") or "default"
    if not isinstance(kind, str) or kind not in _KEYS:
        keys.fail("rope_type", f"{kind!r:.60} is not one of {', '.join(_KEYS)}")
    known = (*_KEYS[kind], *_ALWAYS)
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
    """The factor of cos and sin: given, or the quotient of DeepSeek's two `mscale`s, or YaRN's."""
    if keys.data.get("attention_factor") is not None:
        return keys.number("attention_factor")
    over, under = keys.optional_number("mscale"), keys.optional_number("mscale_all_dim")
    if over is None or under is None:
        return None
    growth = 0.1 * math.log(max(factor, 1.0))
    return (over * growth + 1.0) / (under * growth + 1.0)


def read_mla_scaling(data: dict[str, Any], max_seq_len: int, where: str) -> RopeScaling | None:
    """`read_scaling` for latent attention, where not all of a logit comes from turned parts:
    DeepSeek gives all of it the square of its second `mscale`, and so does Tinsmith of its factor.

    UserError where the turned parts alone would get a factor.
    """
    scaling = read_scaling(data, max_seq_len, where)
    if not isinstance(scaling, YarnScaling) or "kind" in data:
        return scaling
    keys = ConfigReader(data, where)
    if scaling.attention_scaling != 1:
        keys.fail("mscale", "must be that of mscale_all_dim, so that all of a logit is scaled")
    over = keys.optional_number("mscale_all_dim") or 0.0
    usual = replace(scaling, attention_factor=None)
    factor = over * 0.1 * math.log(scaling.factor) + 1.0
    return usual if factor == usual.attention_scaling else replace(scaling, attention_factor=factor)


def write_mla_rope(rope: Rope) -> dict[str, Any]:
    """`write_rope` for latent attention, in DeepSeek's words."""
    written, scaling = write_rope(rope), rope.scaling
    if not isinstance(scaling, YarnScaling):
        return written
    growth = 0.1 * math.log(scaling.factor)
    over = (
        1.0
        if scaling.attention_factor is None
        else (scaling.attention_scaling - 1.0) / (growth or 1.0)
    )
    words: dict[str, Any] = {"attention_factor": 1.0}
    words |= {"mscale": over, "mscale_all_dim": over} if scaling.attention_scaling != 1 else {}
    for key in ("rope_scaling", "rope_parameters"):
        written[key] = written[key] | words
    return written


def write_rope(rope: Rope) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `rope_parameters` of a `config.json`."""
    stretching = _write_scaling(rope.scaling)
    return {
        "rope_theta": rope.theta,
        "rope_scaling": stretching,
        "rope_parameters": {"rope_theta": rope.theta} | (stretching or {"rope_type": "default"}),
    }


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    written: dict[str, Any] = {"rope_type": scaling.kind, "factor": float(scaling.factor)}
    if isinstance(scaling, LinearScaling):
        return written
    written["original_max_position_embeddings"] = scaling.original_max_seq_len
    if isinstance(scaling, Llama3Scaling):
        return written | {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    if scaling.attention_factor is not None:
        written["attention_factor"] = float(scaling.attention_factor)
    return written | {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}


def with_rope_scaling(config: ModelConfig, rope_scaling: dict[str, Any] | None) -> ModelConfig:
    """The same model with another stretching of its positions, and room for the longer context.

    `scaling` as in `read_scaling`; None changes nothing.
    """
    if rope_scaling is None:
        return config
    if not isinstance(rope_scaling, dict):
        raise UserError(f"rope_scaling: needs keys and values (got {rope_scaling!r:.60})")
    if config.positions != "rope":
        raise UserError(f"rope_scaling: this model has {config.positions} positions, not rotary")
    latent = any(isinstance(layer.mixer, MLA) for layer in config.layers)
    read = read_mla_scaling if latent else read_scaling
    found = read(rope_scaling, config.max_seq_len, "rope_scaling")
    context = config.max_seq_len
    if isinstance(found, LinearScaling):
        context = math.ceil(context * found.factor)
    elif found is not None:
        context = max(context, math.ceil(found.original_max_seq_len * found.factor))
    return replace(config, rope=replace(config.rope, scaling=found), max_seq_len=context)

"""Stretched rotary positions, in Hugging Face's words and in Tinsmith's.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 writes both in one
`rope_parameters`; folders that are written here have all three.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tinsmith.core.errors import UserError
from tinsmith.core.parse import nearest, parse
from tinsmith.hub.keys import Keys
from tinsmith.nn.config import ModelConfig
from tinsmith.nn.mixers.mla import MLA
from tinsmith.nn.parts.rope import Linear, Llama3, Rope, Scaling, Yarn

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
Read = Callable[[dict[str, Any], int, str], Scaling | None]
_ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def read_rope(
    data: dict[str, Any],
    context: int,
    where: str,
    read: Read | None = None,
    theta: float = 10000.0,
) -> Rope:
    """The rotary positions of a `config.json` of `context` tokens; `read` its stretching; `theta`
    is what a silent file means.

    UserError for kinds that Tinsmith does not have, and where the file contradicts itself.
    """
    thetas = {_theta(data, where)}
    stretchings: list[Scaling | None] = []
    for key in ("rope_scaling", "rope_parameters"):
        inner, place = data.get(key), f"{where}: {key}"
        if inner is None or inner == {}:
            continue
        if not isinstance(inner, dict):
            raise UserError(f"{place}: must be an object (got {inner!r:.60})")
        thetas.add(_theta(inner, place))
        outer = {"original_max_position_embeddings"} & data.keys()
        stretchings.append(
            (read or read_scaling)(inner | {name: data[name] for name in outer}, context, place)
        )
    given = sorted(theta for theta in thetas if theta is not None)
    if len(given) > 1:
        raise UserError(f"{where}: rope_theta: given twice and differently ({given})")
    if any(other != stretchings[0] for other in stretchings):
        raise UserError(f"{where}: rope_scaling: contradicts rope_parameters; remove one of them")
    base = given[0] if given else theta
    return Rope(theta=base, scaling=stretchings[0] if stretchings else None)


def _theta(data: dict[str, Any], where: str) -> float | None:
    keys = Keys(data, where)
    keys.only("partial_rotary_factor", (1, 1.0))
    return None if data.get("rope_theta") is None else keys.number("rope_theta", above=1)


def read_scaling(data: dict[str, Any], context: int, where: str) -> Scaling | None:
    """`{kind: yarn, factor, original_context, ...}`, or `{rope_type: yarn, factor,
    original_max_position_embeddings, ...}` as in a `config.json` of `context` tokens.
    """
    if "kind" in data:
        return parse(Scaling, data, where)
    keys = Keys(data, where)
    kind = data.get("rope_type") or data.get("type") or "default"
    if not isinstance(kind, str) or kind not in _KEYS:
        keys.fail("rope_type", f"{kind!r:.60} is not one of {', '.join(_KEYS)}")
    known = (*_KEYS[kind], *_ALWAYS)
    for key, value in data.items():
        if key not in known and value is not None and key != "original_max_position_embeddings":
            keys.fail(key, f"unknown for rope_type {kind!r}{nearest(key, list(known))}")
    try:
        return None if kind == "default" else _scaling(kind, keys, context)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _scaling(kind: str, keys: Keys, context: int) -> Scaling:
    if kind == "linear":
        return Linear(factor=keys.number("factor"))
    original = keys.size("original_max_position_embeddings", context)
    if kind == "llama3":
        low = keys.number("low_freq_factor")
        return Llama3(
            factor=keys.number("factor"),
            original_context=original,
            low_factor=low,
            high_factor=keys.number("high_freq_factor", above=low),
        )
    keys.only("truncate", (True,))
    factor = keys.number("factor", context / original)
    return Yarn(
        factor=factor,
        original_context=original,
        beta_fast=keys.number("beta_fast", 32),
        beta_slow=keys.number("beta_slow", 1),
        attention_factor=_attention_factor(keys, factor),
    )


def _attention_factor(keys: Keys, factor: float) -> float | None:
    """The factor of cos and sin: given, or the quotient of DeepSeek's two `mscale`s, or YaRN's."""
    if keys.data.get("attention_factor") is not None:
        return keys.number("attention_factor")
    over, under = keys.optional_number("mscale"), keys.optional_number("mscale_all_dim")
    if over is None or under is None:
        return None
    growth = 0.1 * math.log(max(factor, 1.0))
    return (over * growth + 1.0) / (under * growth + 1.0)


def read_latent_scaling(data: dict[str, Any], context: int, where: str) -> Scaling | None:
    """`read_scaling` for latent attention, where not all of a logit comes from turned parts:
    DeepSeek gives all of it the square of its second `mscale`, and so does Tinsmith of its factor.

    UserError where the turned parts alone would get a factor.
    """
    scaling = read_scaling(data, context, where)
    if not isinstance(scaling, Yarn) or "kind" in data:
        return scaling
    keys = Keys(data, where)
    if scaling.turn != 1:
        keys.fail("mscale", "must be that of mscale_all_dim, so that all of a logit is scaled")
    over = keys.optional_number("mscale_all_dim") or 0.0
    usual = replace(scaling, attention_factor=None)
    factor = over * 0.1 * math.log(scaling.factor) + 1.0
    return usual if factor == usual.turn else replace(scaling, attention_factor=factor)


def write_latents(rope: Rope) -> dict[str, Any]:
    """`write_rope` for latent attention, in DeepSeek's words."""
    written, scaling = write_rope(rope), rope.scaling
    if not isinstance(scaling, Yarn):
        return written
    growth = 0.1 * math.log(scaling.factor)
    over = 1.0 if scaling.attention_factor is None else (scaling.turn - 1.0) / (growth or 1.0)
    words: dict[str, Any] = {"attention_factor": 1.0}
    words |= {"mscale": over, "mscale_all_dim": over} if scaling.turn != 1 else {}
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


def _write_scaling(scaling: Scaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    written: dict[str, Any] = {"rope_type": scaling.kind, "factor": float(scaling.factor)}
    if isinstance(scaling, Linear):
        return written
    written["original_max_position_embeddings"] = scaling.original_context
    if isinstance(scaling, Llama3):
        return written | {
            "low_freq_factor": scaling.low_factor,
            "high_freq_factor": scaling.high_factor,
        }
    if scaling.attention_factor is not None:
        written["attention_factor"] = float(scaling.attention_factor)
    return written | {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}


def stretched(config: ModelConfig, scaling: dict[str, Any] | None) -> ModelConfig:
    """The same model with another stretching of its positions, and room for the longer context.

    `scaling` as in `read_scaling`; None changes nothing.
    """
    if scaling is None:
        return config
    if not isinstance(scaling, dict):
        raise UserError(f"rope_scaling: needs keys and values (got {scaling!r:.60})")
    if config.positions != "rope":
        raise UserError(f"rope_scaling: this model has {config.positions} positions, not rotary")
    latent = any(isinstance(layer.mixer, MLA) for layer in config.layers)
    read = read_latent_scaling if latent else read_scaling
    found = read(scaling, config.max_context, "rope_scaling")
    context = config.max_context
    if isinstance(found, Linear):
        context = math.ceil(context * found.factor)
    elif found is not None:
        context = max(context, math.ceil(found.original_context * found.factor))
    return replace(config, rope=replace(config.rope, scaling=found), max_context=context)

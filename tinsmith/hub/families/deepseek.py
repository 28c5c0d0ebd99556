"""Translate configs with multi-head latent attention: DeepSeek-V3, and DeepSeek-V2 without experts.

The first layers have SwiGLU, the others experts. Folders are always written as V3, whose rotary
pairs are interleaved (`families.names` reorders the rows).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tinsmith.hub.families import moe
from tinsmith.hub.families.rope import read_mla_scaling as read_scaling
from tinsmith.hub.families.rope import write_mla_rope
from tinsmith.hub.keys import ConfigReader
from tinsmith.nn.attention.rope import YarnScaling
from tinsmith.nn.config import Layer, ModelConfig
from tinsmith.nn.feedforwards.deepseek import DeepSeekMoE
from tinsmith.nn.feedforwards.dense import SwiGLU
from tinsmith.nn.mixers.mla import MLA

__all__ = ["FAMILIES", "kind_of", "problem", "read_layers", "read_scaling", "write_keys"]

_ONLY: dict[str, tuple[Any, ...]] = {
    "rope_interleave": (True,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}


class DeepSeekFamily(NamedTuple):
    """A stock family: its class, and the defaults of transformers for keys missing in
    `config.json`.
    """

    architecture: str
    max_seq_len: int
    first_k_dense: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6


FAMILIES = {
    "deepseek_v2": DeepSeekFamily("DeepseekV2ForCausalLM", 2048, 0),
    "deepseek_v3": DeepSeekFamily("DeepseekV3ForCausalLM", 4096, 3),
}


def read_layers(kind: str, keys: ConfigReader) -> tuple[Sequence[Layer], Sequence[Layer]]:
    """Read the first layers and the layer that is repeated; UserError if unsupported."""
    for key, allowed in _ONLY.items():
        keys.check_allowed(key, allowed)
    depth = keys.positive_int("num_hidden_layers")
    num_dense = keys.data.get("first_k_dense_replace", FAMILIES[kind].first_k_dense)
    if type(num_dense) is not int or num_dense < 0:
        keys.fail("first_k_dense_replace", f"must be a number of layers (got {num_dense!r:.60})")
    if kind == "deepseek_v2" and num_dense < depth:
        keys.fail(
            "first_k_dense_replace", f"{num_dense} of {depth} layers: V2's experts are not read"
        )
    default_q_rank = 1536 if "q_lora_rank" not in keys.data else None
    mixer = MLA(
        heads=keys.positive_int("num_attention_heads"),
        kv_rank=keys.positive_int("kv_lora_rank", 512),
        q_rank=keys.optional_positive_int("q_lora_rank", default_q_rank),
        nope_dim=keys.positive_int("qk_nope_head_dim", 128),
        rope_dim=keys.positive_int("qk_rope_head_dim", 64),
        v_dim=keys.positive_int("v_head_dim", 128),
    )
    dense = [SwiGLU(hidden_dim=keys.positive_int("intermediate_size"))] if num_dense else []
    first = [Layer(mixer=mixer, feed_forward=feed) for feed in dense * min(num_dense, depth)]
    if num_dense >= depth:
        return (), first[:1]
    return first, [Layer(mixer=mixer, feed_forward=moe.read_deepseek(keys))]


def kind_of(config: ModelConfig) -> str:
    """Return the `model_type` for a model without `problem`."""
    return "deepseek_v3"


def write_keys(kind: str, config: ModelConfig) -> dict[str, Any]:
    """Return the keys of latent attention and of the experts."""
    mixer, feeds = _mixers(config)[0], [layer.feed_forward for layer in config.layers]
    moe_layers = [feed for feed in feeds if isinstance(feed, DeepSeekMoE)]
    return write_mla_rope(config.rope) | {
        "num_key_value_heads": mixer.heads,
        "kv_lora_rank": mixer.kv_rank,
        "q_lora_rank": mixer.q_rank,
        "qk_nope_head_dim": mixer.nope_dim,
        "qk_rope_head_dim": mixer.rope_dim,
        "v_head_dim": mixer.v_dim,
        "head_dim": mixer.rope_dim,
        "rope_interleave": True,
        "attention_bias": False,
        "first_k_dense_replace": config.depth - len(moe_layers),
        "num_nextn_predict_layers": 0,
        **(moe.write_deepseek(moe_layers[0]) if moe_layers else {}),
    }


def problem(config: ModelConfig) -> str | None:
    """Return a property that DeepSeek-V3 does not have, or None.

    The model has latent attention with SwiGLU or `deepseek_moe` in every layer.
    """
    seen_moe = False
    for index, layer in enumerate(config.layers):
        feed = layer.feed_forward
        if layer.mixer != config.layers[0].mixer:
            return f"layer {index} is of another shape than layer 0"
        if isinstance(feed, SwiGLU) and feed.bias:
            return "feed_forward.bias beside latent attention"
        if isinstance(feed, SwiGLU) and seen_moe:
            return f"layer {index} is dense after layers of experts"
        if isinstance(feed, DeepSeekMoE):
            seen_moe = True
            if (message := moe.problem(feed)) is not None:
                return message
    if (message := moe.layer_mismatch(config)) is not None:
        return message
    scaling = config.rope.scaling
    if (
        isinstance(scaling, YarnScaling)
        and scaling.attention_scaling != 1
        and math.log(scaling.factor) == 0
    ):
        return "an attention_factor without an extended context"
    return None


def _mixers(config: ModelConfig) -> list[MLA]:
    return [layer.mixer for layer in config.layers if isinstance(layer.mixer, MLA)]

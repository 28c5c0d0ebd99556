"""The experts of Qwen3-MoE, Mixtral and DeepSeek-V3: what `config.json` says of them.

Stacks of experts: Tinsmith keeps (E, O, I) in one tensor, Hugging Face's files one per expert.

blocks.3.feed.experts.up_proj.weight  <->  blocks.3.feed.experts.0.up_proj.weight, ...
"""

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tinsmith.hub.keys import ConfigReader
from tinsmith.nn.config import ModelConfig
from tinsmith.nn.contract import FeedForwardConfigBase
from tinsmith.nn.feedforwards.deepseek import DeepSeekMoE
from tinsmith.nn.feedforwards.dense import SwiGLU
from tinsmith.nn.feedforwards.topk import TopKMoE

StockFeedForward = SwiGLU | TopKMoE | DeepSeekMoE


def read_mixtral(keys: ConfigReader) -> TopKMoE:
    """The experts of every layer."""
    keys.check_allowed("router_jitter_noise", (0, 0.0))
    chosen = keys.positive_int("num_experts_per_tok", 2)
    _refuse_one(keys, "num_experts_per_tok", chosen, True)
    return TopKMoE(
        experts=keys.positive_int("num_local_experts", 8),
        top_k=chosen,
        hidden_dim=keys.positive_int("intermediate_size"),
        balance_weight=keys.number("router_aux_loss_coef", 0.001, above=-1),
    )


def read_qwen3(keys: ConfigReader, depth: int) -> list[StockFeedForward]:
    """Of each layer its experts, or the dense feed-forward that it has instead."""
    chosen, renormalise = (
        keys.positive_int("num_experts_per_tok", 8),
        keys.flag("norm_topk_prob", False),
    )
    _refuse_one(keys, "norm_topk_prob", chosen, renormalise)
    name = "num_experts" if keys.data.get("num_experts") is not None else "num_local_experts"
    routed = TopKMoE(
        experts=keys.positive_int(name, 128),
        top_k=chosen,
        hidden_dim=keys.positive_int("moe_intermediate_size", 768),
        norm_topk_prob=renormalise,
        balance_weight=keys.number("router_aux_loss_coef", 0.001, above=-1),
    )
    every, only = (
        keys.positive_int("decoder_sparse_step", 1),
        keys.data.get("mlp_only_layers") or [],
    )
    if not isinstance(only, list) or any(type(index) is not int for index in only):
        keys.fail("mlp_only_layers", f"must be a list of layers (got {only!r:.60})")
    sparse = [index not in only and (index + 1) % every == 0 for index in range(depth)]
    dense = routed if all(sparse) else SwiGLU(hidden_dim=keys.positive_int("intermediate_size"))
    return [routed if chosen else dense for chosen in sparse]


def read_deepseek(keys: ConfigReader) -> DeepSeekMoE:
    """The experts of the layers that have some."""
    keys.check_allowed("scoring_func", ("sigmoid",))
    keys.check_allowed("topk_method", ("noaux_tc",))
    keys.check_allowed("moe_layer_freq", (1,))
    chosen, renormalise = (
        keys.positive_int("num_experts_per_tok", 8),
        keys.flag("norm_topk_prob", True),
    )
    _refuse_one(keys, "norm_topk_prob", chosen, renormalise)
    return DeepSeekMoE(
        experts=keys.positive_int("n_routed_experts", 256),
        top_k=chosen,
        hidden_dim=keys.positive_int("moe_intermediate_size", 2048),
        n_shared_experts=keys.positive_int("n_shared_experts", 1),
        norm_topk_prob=renormalise,
        routed_scaling_factor=keys.number("routed_scaling_factor", 2.5),
        n_group=keys.positive_int("n_group", 8),
        topk_group=keys.positive_int("topk_group", 4),
    )


def _refuse_one(keys: ConfigReader, key: str, chosen: int, renormalise: bool) -> None:
    if renormalise and chosen == 1:
        keys.fail(key, "one expert a token, renormalised, has weight 1; here it has its own score")


def write_mixtral(feed: TopKMoE) -> dict[str, Any]:
    """The keys of its experts, beside `intermediate_size`."""
    return {
        "num_local_experts": feed.experts,
        "num_experts_per_tok": feed.top_k,
        "router_aux_loss_coef": _switch_weight(feed),
    }


def write_qwen3(feed: TopKMoE, config: ModelConfig) -> dict[str, Any]:
    """The keys of its experts, and which layers are dense."""
    feeds = [layer.feed_forward for layer in config.layers]
    return {
        "num_experts": feed.experts,
        "num_experts_per_tok": feed.top_k,
        "moe_intermediate_size": feed.hidden_dim,
        "norm_topk_prob": feed.norm_topk_prob and feed.top_k > 1,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index, one in enumerate(feeds) if isinstance(one, SwiGLU)],
        "router_aux_loss_coef": _switch_weight(feed),
    }


def write_deepseek(feed: DeepSeekMoE) -> dict[str, Any]:
    """The keys of its experts."""
    return {
        "n_routed_experts": feed.experts,
        "num_experts_per_tok": feed.top_k,
        "moe_intermediate_size": feed.hidden_dim,
        "n_shared_experts": feed.n_shared_experts,
        "norm_topk_prob": feed.norm_topk_prob and feed.top_k > 1,
        "routed_scaling_factor": feed.routed_scaling_factor,
        "n_group": feed.n_group,
        "topk_group": feed.num_topk_groups,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }


def _switch_weight(feed: TopKMoE) -> float:
    return feed.balance_weight if feed.balance == "switch" else 0.0


def intermediate_size(config: ModelConfig) -> int:
    """`intermediate_size`: of the dense layers, or of experts where there are none."""
    feeds = [layer.feed_forward for layer in config.layers]
    return next((feed for feed in feeds if isinstance(feed, SwiGLU)), feeds[0]).hidden_dim


def without_training_settings(feed: FeedForwardConfigBase) -> FeedForwardConfigBase:
    """A feed-forward with what only acts in training set aside."""
    if isinstance(feed, TopKMoE):
        return replace(feed, balance="none", balance_weight=0.0, z_weight=0.0)
    if isinstance(feed, DeepSeekMoE):
        return replace(
            feed,
            bias_update_speed=0.0,
            balance_weight=0.0,
            noise=0.0,
            topk_group=feed.num_topk_groups,
        )
    return feed


def layer_mismatch(config: ModelConfig) -> str | None:
    """The first feed-forward that differs from an earlier one of its kind."""
    first: dict[str, FeedForwardConfigBase] = {}
    for index, layer in enumerate(config.layers):
        feed = without_training_settings(layer.feed_forward)
        if first.setdefault(layer.feed_forward.kind, feed) != feed:
            return f"layer {index} is of another shape than layer 0"
    return None


def problem(feed: TopKMoE | DeepSeekMoE) -> str | None:
    """What no stock family has, of one layer's experts."""
    if feed.activation != "swiglu":
        return f"experts of {feed.activation}"
    if isinstance(feed, TopKMoE):
        return "shared experts beside grouped-query attention" if feed.n_shared_experts else None
    if feed.score != "sigmoid":
        return f"a {feed.score} score beside latent attention"
    if not feed.n_shared_experts:
        return "no shared experts beside latent attention"
    return "groups of one expert" if feed.experts == feed.n_group else None


_STACK = re.compile(r"(.*\.feed\.experts)\.([a-z_]+\.weight)")

_SLICE = re.compile(r"(.*\.feed\.experts)\.(\d+)\.([a-z_]+\.weight)")


def split_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every stack as one tensor per expert, views of it; the rest as it is."""
    parts: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _STACK.fullmatch(name)
        if match is None:
            parts[name] = tensor
        else:
            parts |= {f"{match[1]}.{e}.{match[2]}": matrix for e, matrix in enumerate(tensor)}
    return parts


def stack_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `apart`."""
    whole: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        match = _SLICE.fullmatch(name)
        if match is None:
            whole[name] = tensor
        else:
            stacks.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
    return whole | {
        name: torch.stack([matrices[e] for e in range(len(matrices))])
        for name, matrices in stacks.items()
    }

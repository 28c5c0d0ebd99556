"""Translate the MoE keys of `config.json`: Mixtral, Qwen3-MoE and DeepSeek-V3.

Each family has `read_FAMILY` (keys to feed-forward config) and `write_FAMILY` (the inverse); the
functions below them are shared. `families.names` translates the tensors.
"""

from dataclasses import replace
from typing import Any

from tinsmith.hub.keys import ConfigReader
from tinsmith.nn.config import ModelConfig
from tinsmith.nn.contract import FeedForwardConfigBase
from tinsmith.nn.feedforwards.deepseek import DeepSeekMoE
from tinsmith.nn.feedforwards.dense import SwiGLU
from tinsmith.nn.feedforwards.topk import TopKMoE

StockFeedForward = SwiGLU | TopKMoE | DeepSeekMoE


def read_mixtral(keys: ConfigReader) -> TopKMoE:
    """Read the experts of Mixtral, which are the same in every layer."""
    keys.check_allowed("router_jitter_noise", (0, 0.0))
    top_k = keys.positive_int("num_experts_per_tok", 2)
    _refuse_renormalised_top1(keys, "num_experts_per_tok", top_k, True)
    return TopKMoE(
        experts=keys.positive_int("num_local_experts", 8),
        top_k=top_k,
        hidden_dim=keys.positive_int("intermediate_size"),
        balance_weight=keys.number("router_aux_loss_coef", 0.001, above=-1),
    )


def write_mixtral(feed: TopKMoE) -> dict[str, Any]:
    """Return the keys of Mixtral's experts, except `intermediate_size`."""
    return {
        "num_local_experts": feed.experts,
        "num_experts_per_tok": feed.top_k,
        "router_aux_loss_coef": _router_aux_loss_coef(feed),
    }


def read_qwen3(keys: ConfigReader, depth: int) -> list[StockFeedForward]:
    """Read the feed-forward of every layer of Qwen3-MoE: experts, or a dense one."""
    top_k = keys.positive_int("num_experts_per_tok", 8)
    norm_topk_prob = keys.flag("norm_topk_prob", False)
    _refuse_renormalised_top1(keys, "norm_topk_prob", top_k, norm_topk_prob)
    name = "num_experts" if keys.data.get("num_experts") is not None else "num_local_experts"
    routed = TopKMoE(
        experts=keys.positive_int(name, 128),
        top_k=top_k,
        hidden_dim=keys.positive_int("moe_intermediate_size", 768),
        norm_topk_prob=norm_topk_prob,
        balance_weight=keys.number("router_aux_loss_coef", 0.001, above=-1),
    )
    step = keys.positive_int("decoder_sparse_step", 1)
    dense_layers = keys.data.get("mlp_only_layers") or []
    if not isinstance(dense_layers, list) or any(type(index) is not int for index in dense_layers):
        keys.fail("mlp_only_layers", f"must be a list of layers (got {dense_layers!r:.60})")
    is_sparse = [index not in dense_layers and (index + 1) % step == 0 for index in range(depth)]
    dense = routed if all(is_sparse) else SwiGLU(hidden_dim=keys.positive_int("intermediate_size"))
    return [routed if sparse else dense for sparse in is_sparse]


def write_qwen3(feed: TopKMoE, config: ModelConfig) -> dict[str, Any]:
    """Return the keys of Qwen3-MoE's experts and the list of its dense layers."""
    return {
        "num_experts": feed.experts,
        "num_experts_per_tok": feed.top_k,
        "moe_intermediate_size": feed.hidden_dim,
        "norm_topk_prob": feed.norm_topk_prob and feed.top_k > 1,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [
            index
            for index, layer in enumerate(config.layers)
            if isinstance(layer.feed_forward, SwiGLU)
        ],
        "router_aux_loss_coef": _router_aux_loss_coef(feed),
    }


def read_deepseek(keys: ConfigReader) -> DeepSeekMoE:
    """Read the experts of DeepSeek-V3, for the layers that have experts."""
    keys.check_allowed("scoring_func", ("sigmoid",))
    keys.check_allowed("topk_method", ("noaux_tc",))
    keys.check_allowed("moe_layer_freq", (1,))
    top_k = keys.positive_int("num_experts_per_tok", 8)
    norm_topk_prob = keys.flag("norm_topk_prob", True)
    _refuse_renormalised_top1(keys, "norm_topk_prob", top_k, norm_topk_prob)
    return DeepSeekMoE(
        experts=keys.positive_int("n_routed_experts", 256),
        top_k=top_k,
        hidden_dim=keys.positive_int("moe_intermediate_size", 2048),
        n_shared_experts=keys.positive_int("n_shared_experts", 1),
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=keys.number("routed_scaling_factor", 2.5),
        n_group=keys.positive_int("n_group", 8),
        topk_group=keys.positive_int("topk_group", 4),
    )


def write_deepseek(feed: DeepSeekMoE) -> dict[str, Any]:
    """Return the keys of DeepSeek-V3's experts."""
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


def _refuse_renormalised_top1(
    keys: ConfigReader, key: str, top_k: int, norm_topk_prob: bool
) -> None:
    """Refuse renormalised top-1 routing: Tinsmith weights a single expert by its score."""
    if norm_topk_prob and top_k == 1:
        keys.fail(key, "one expert a token, renormalised, has weight 1; here it has its own score")


def _router_aux_loss_coef(feed: TopKMoE) -> float:
    return feed.balance_weight if feed.balance == "switch" else 0.0


def intermediate_size(config: ModelConfig) -> int:
    """Return the width of the dense layers, or of the experts if no layer is dense."""
    feeds = [layer.feed_forward for layer in config.layers]
    return next((feed for feed in feeds if isinstance(feed, SwiGLU)), feeds[0]).hidden_dim


def problem(feed: TopKMoE | DeepSeekMoE) -> str | None:
    """Return a property of one layer's experts that no stock family has, or None."""
    if feed.activation != "swiglu":
        return f"experts of {feed.activation}"
    if isinstance(feed, TopKMoE):
        return "shared experts beside grouped-query attention" if feed.n_shared_experts else None
    if feed.score != "sigmoid":
        return f"a {feed.score} score beside latent attention"
    if not feed.n_shared_experts:
        return "no shared experts beside latent attention"
    return "groups of one expert" if feed.experts == feed.n_group else None


def layer_mismatch(config: ModelConfig) -> str | None:
    """Describe the first feed-forward that differs from an earlier one of its kind."""
    first: dict[str, FeedForwardConfigBase] = {}
    for index, layer in enumerate(config.layers):
        feed = without_training_settings(layer.feed_forward)
        if first.setdefault(layer.feed_forward.kind, feed) != feed:
            return f"layer {index} is of another shape than layer 0"
    return None


def without_training_settings(feed: FeedForwardConfigBase) -> FeedForwardConfigBase:
    """Return a feed-forward config without the settings that act in training only."""
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

"""The experts of Qwen3-MoE, Mixtral and DeepSeek-V3: what `config.json` says of them."""

from dataclasses import replace
from typing import Any

from tinsmith.hub.keys import Keys
from tinsmith.nn.config import ModelConfig
from tinsmith.nn.contract import FeedForwardKind
from tinsmith.nn.feedforwards.deepseek import DeepSeekMoE
from tinsmith.nn.feedforwards.dense import SwiGLU
from tinsmith.nn.feedforwards.topk import TopKMoE

Feed = SwiGLU | TopKMoE | DeepSeekMoE


def read_mixtral(keys: Keys) -> TopKMoE:
    """The experts of every layer."""
    keys.only("router_jitter_noise", (0, 0.0))
    chosen = keys.size("num_experts_per_tok", 2)
    _refuse_one(keys, "num_experts_per_tok", chosen, True)
    return TopKMoE(
        experts=keys.size("num_local_experts", 8),
        top_k=chosen,
        hidden=keys.size("intermediate_size"),
        balance_weight=keys.number("router_aux_loss_coef", 0.001, above=-1),
    )


def read_qwen3(keys: Keys, depth: int) -> list[Feed]:
    """Of each layer its experts, or the dense feed-forward that it has instead."""
    chosen, renormalise = keys.size("num_experts_per_tok", 8), keys.flag("norm_topk_prob", False)
    _refuse_one(keys, "norm_topk_prob", chosen, renormalise)
    name = "num_experts" if keys.data.get("num_experts") is not None else "num_local_experts"
    routed = TopKMoE(
        experts=keys.size(name, 128),
        top_k=chosen,
        hidden=keys.size("moe_intermediate_size", 768),
        renormalise=renormalise,
        balance_weight=keys.number("router_aux_loss_coef", 0.001, above=-1),
    )
    every, only = keys.size("decoder_sparse_step", 1), keys.data.get("mlp_only_layers") or []
    if not isinstance(only, list) or any(type(index) is not int for index in only):
        keys.fail("mlp_only_layers", f"must be a list of layers (got {only!r:.60})")
    sparse = [index not in only and (index + 1) % every == 0 for index in range(depth)]
    dense = routed if all(sparse) else SwiGLU(hidden=keys.size("intermediate_size"))
    return [routed if chosen else dense for chosen in sparse]


def read_deepseek(keys: Keys) -> DeepSeekMoE:
    """The experts of the layers that have some."""
    keys.only("scoring_func", ("sigmoid",))
    keys.only("topk_method", ("noaux_tc",))
    keys.only("moe_layer_freq", (1,))
    chosen, renormalise = keys.size("num_experts_per_tok", 8), keys.flag("norm_topk_prob", True)
    _refuse_one(keys, "norm_topk_prob", chosen, renormalise)
    return DeepSeekMoE(
        experts=keys.size("n_routed_experts", 256),
        top_k=chosen,
        hidden=keys.size("moe_intermediate_size", 2048),
        shared=keys.size("n_shared_experts", 1),
        renormalise=renormalise,
        scale=keys.number("routed_scaling_factor", 2.5),
        groups=keys.size("n_group", 8),
        kept_groups=keys.size("topk_group", 4),
    )


def _refuse_one(keys: Keys, key: str, chosen: int, renormalise: bool) -> None:
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
        "moe_intermediate_size": feed.hidden,
        "norm_topk_prob": feed.renormalise and feed.top_k > 1,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index, one in enumerate(feeds) if isinstance(one, SwiGLU)],
        "router_aux_loss_coef": _switch_weight(feed),
    }


def write_deepseek(feed: DeepSeekMoE) -> dict[str, Any]:
    """The keys of its experts."""
    return {
        "n_routed_experts": feed.experts,
        "num_experts_per_tok": feed.top_k,
        "moe_intermediate_size": feed.hidden,
        "n_shared_experts": feed.shared,
        "norm_topk_prob": feed.renormalise and feed.top_k > 1,
        "routed_scaling_factor": feed.scale,
        "n_group": feed.groups,
        "topk_group": feed.kept,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }


def _switch_weight(feed: TopKMoE) -> float:
    return feed.balance_weight if feed.balance == "switch" else 0.0


def width(config: ModelConfig) -> int:
    """`intermediate_size`: of the dense layers, or of experts where there are none."""
    feeds = [layer.feed_forward for layer in config.layers]
    return next((feed for feed in feeds if isinstance(feed, SwiGLU)), feeds[0]).hidden


def computed(feed: FeedForwardKind) -> FeedForwardKind:
    """A feed-forward with what only acts in training set aside."""
    if isinstance(feed, TopKMoE):
        return replace(feed, balance="none", balance_weight=0.0, z_weight=0.0)
    if isinstance(feed, DeepSeekMoE):
        return replace(feed, bias_rate=0.0, balance_weight=0.0, noise=0.0, kept_groups=feed.kept)
    return feed


def another_shape(config: ModelConfig) -> str | None:
    """The first feed-forward that differs from an earlier one of its kind."""
    first: dict[str, FeedForwardKind] = {}
    for index, layer in enumerate(config.layers):
        feed = computed(layer.feed_forward)
        if first.setdefault(layer.feed_forward.kind, feed) != feed:
            return f"layer {index} is of another shape than layer 0"
    return None


def problem(feed: TopKMoE | DeepSeekMoE) -> str | None:
    """What no stock family has, of one layer's experts."""
    if feed.activation != "swiglu":
        return f"experts of {feed.activation}"
    if isinstance(feed, TopKMoE):
        return "shared experts beside grouped-query attention" if feed.shared else None
    if feed.score != "sigmoid":
        return f"a {feed.score} score beside latent attention"
    if not feed.shared:
        return "no shared experts beside latent attention"
    return "groups of one expert" if feed.experts == feed.groups else None

"""The models that are compared: routers, methods against dead experts, sizes of experts, and mixers
with experts, all with equal numbers of active parameters.
"""

from collections.abc import Callable
from typing import Any

import torch

from tinsmith import LM, ModelConfig

Section = dict[str, Any]

GQA: Section = {"kind": "gqa", "heads": 4, "kv_heads": 2}
RESETS = 50
"""`reset_interval` of the runs, which are shorter than the published 1,000 steps."""
SDL = 0.1
"""Weight of the loss that moves the number of active experts to its target. It is ten times the
published one for these short runs; the page has the number that was reached.
"""


def dense(hidden: int) -> Section:
    """Return the dense baseline, a SwiGLU feed-forward."""
    return {"kind": "swiglu", "hidden_dim": hidden}


def topk(experts: int = 8, top_k: int = 2, balance: str = "switch") -> Callable[[int], Section]:
    """Return MiniMind's top-k experts without shared experts."""
    keys = {"experts": experts, "top_k": top_k, "balance": balance}
    return lambda hidden: {"kind": "topk_moe", "hidden_dim": hidden, "n_shared_experts": 0, **keys}


def deepseek(hidden: int) -> Section:
    """Return three of sixteen experts and a shared one."""
    return {
        "kind": "deepseek_moe",
        "hidden_dim": hidden,
        "experts": 16,
        "top_k": 3,
        "n_shared_experts": 1,
    }


def dyn(experts: int = 16, **keys: Any) -> Callable[[int], Section]:
    """Return threshold experts; the sparsity and diversity loss (SDL) aims at a quarter of them."""
    common = {"experts": experts, "reset_interval": RESETS, "sdl_weight": SDL}
    return lambda hidden: {"kind": "dyn_moe", "hidden_dim": hidden} | common | keys


FEEDS: dict[str, Callable[[int], Section]] = {
    "dense": dense,
    "topk_moe": topk(),
    "deepseek_moe": deepseek,
    "dyn_moe": dyn(),
    "dyn_moe smk": dyn(router_grad="smk"),
    "dyn_moe sml": dyn(router_grad="sml"),
    "dyn_moe both": dyn(router_grad="both"),
    "topk_moe unbalanced": topk(balance="none"),
    "dyn_moe re-birth": dyn(sdl_weight=0.0),
    "dyn_moe sdl": dyn(reset_interval=None),
    "dyn_moe neither": dyn(sdl_weight=0.0, reset_interval=None),
    "topk_moe 1 of 4": topk(4, 1),
    "topk_moe 4 of 16": topk(16, 4),
    "topk_moe 8 of 32": topk(32, 8),
    "dyn_moe 2 of 8": dyn(8),
    "dyn_moe 8 of 32": dyn(32),
}
MIXERS: dict[str, Section] = {
    "dyn_heads": {"kind": "dyn_heads", "heads": 4, "kv_heads": 2, "experts": 4}
    | {"reset_interval": RESETS, "sdl_weight": SDL},
    **{
        name: {"kind": "dyn_lora", "base": GQA, "experts": 8, "rank": 8, "alpha": alpha}
        | {"reset_interval": RESETS, "sdl_weight": SDL}
        for name, alpha in {"dyn_lora": 8, "dyn_lora alpha 1": 1}.items()
    },
}
CASES = (*FEEDS, *MIXERS)
GROUPS = {
    "Routers": (
        *("dense", "topk_moe", "deepseek_moe"),
        *("dyn_moe", "dyn_moe smk", "dyn_moe sml", "dyn_moe both"),
    ),
    "What keeps experts alive": (
        *("topk_moe", "topk_moe unbalanced"),
        *("dyn_moe", "dyn_moe re-birth", "dyn_moe sdl", "dyn_moe neither"),
    ),
    "Few large or many small experts": (
        *("topk_moe 1 of 4", "topk_moe", "topk_moe 4 of 16", "topk_moe 8 of 32"),
        *("dyn_moe 2 of 8", "dyn_moe", "dyn_moe 8 of 32"),
    ),
    "Routed attention": ("dense", "dyn_heads", "dyn_lora", "dyn_lora alpha 1"),
}
"""Title -> cases; a case may be in several groups."""


def model(case: str, sizes: Section, budget: int) -> Section:
    """Return the `model:` section of a case, with feed-forwards that fill the active parameters."""
    feed = FEEDS.get(case, dense)

    def section(hidden: int) -> Section:
        layer = {"mixer": MIXERS.get(case, GQA), "feed_forward": feed(hidden)}
        return sizes | {"pattern": [layer]}

    step = 2
    first, second = (active(section(hidden)) for hidden in (step, 2 * step))
    return section(step * max(1, 1 + round((budget - first) / (second - first))))


def active(section: Section) -> int:
    """Return the number of active parameters of a token."""
    return _meta_model(section).active_parameter_count()


def total(section: Section) -> int:
    """Return the number of all parameters."""
    return _meta_model(section).parameter_count()


def _meta_model(section: Section) -> LM:
    with torch.device("meta"):
        return LM(ModelConfig.from_dict(section))

"""Configs and facts of every kind, for the contract suite. A new kind is added here.

| table | contents |
|---|---|
| `SAMPLES` | configs of each kind that switch its options on |
| `CACHE_SIZES` | numbers in a mixer's cache per row |
| `SELECTIVE` | kinds that select tokens or experts |
| `NOT_BITWISE_CAUSAL` | mixers that are causal only up to rounding |
| `NOT_TRUNCATABLE` | mixers whose cache cannot forget tokens |
| `ZERO_GRAD_AT_INIT` | parameters whose gradient is 0 at the first step |
| `USUAL`, `COMBINATIONS` | which configs of the three slots are combined |

A file that `pytest tests/contracts --contracts my_mixer.py` tests may define the first six itself.
Without `SAMPLES`, its kinds are tested with the widths in `DEFAULTS`. `recurrent.py` is such a file
that is always tested.
"""

from collections.abc import Callable
from typing import Any

DIM, VOCAB = 32, 48

LATENT = {"heads": 4, "kv_rank": 8, "q_rank": 12, "nope_dim": 6, "rope_dim": 4, "v_dim": 10}
HYBRID = {"compress_block": 4, "window": 5, "index_topk": 5, "index_heads": 2, "index_dim": 6}
SAMPLES: dict[str, list[dict[str, Any]]] = {
    "gqa": [
        {"heads": 4},
        {"heads": 4, "kv_heads": 2},
        {"heads": 4, "qk_norm": True},
        {"heads": 4, "window": 5},
        {"heads": 4, "sinks": True},
        {"heads": 4, "kv_heads": 2, "window": 5, "sinks": True},
        {"heads": 4, "kv_heads": 2, "value_residual": True},
        {"heads": 4, "bias": "all"},
        {"heads": 4, "rope": False},
        {"heads": 4, "kv_heads": 1, "head_dim": 12},
    ],
    "mla": [LATENT, LATENT | {"heads": 2, "kv_rank": 24, "q_rank": None, "v_dim": 4}],
    "dsa": [
        LATENT | {"index_heads": 2, "index_dim": 6, "index_topk": 5},
        LATENT | {"index_heads": 1, "index_dim": 4, "index_topk": 4, "index_target": "selected"},
    ],
    "hybrid": [
        LATENT | HYBRID | {"mode": "nsa"},
        LATENT | HYBRID | {"mode": "swa", "gate": "sigmoid", "q_rank": None},
        LATENT | HYBRID | {"branches": ["compress"], "compress_block": 1},
    ],
    "nsa": [
        {
            **{"heads": 4, "kv_heads": 2, "compress_block": 4, "compress_stride": 2},
            **{"select_block": 4, "select_count": 4, "window": 5, "value_residual": True},
        },
        {
            **{"heads": 4, "kv_heads": 1, "compress_block": 4, "compress_stride": 4},
            **{"select_block": 8, "select_count": 5, "window": 6, "qk_norm": True},
        },
    ],
    "dyn_heads": [
        {"heads": 4, "experts": 4},
        {
            **{"heads": 4, "experts": 3, "kv_heads": 2, "head_dim": 6, "window": 5},
            **{"qk_norm": True, "combine": "sum"},
        },
    ],
    "dyn_lora": [
        {"base": {"kind": "gqa", "heads": 4, "kv_heads": 2}, "experts": 4, "rank": 3},
        {
            "base": {"kind": "gqa", "heads": 4, "value_residual": True, "bias": "all"},
            **{"experts": 3, "rank": 2, "combine": "rescaled_sum"},
        },
    ],
    "swiglu": [{"hidden_dim": 48}, {"hidden_dim": 48, "bias": True}],
    "relu2": [{"hidden_dim": 48}, {"hidden_dim": 48, "bias": True}],
    "topk_moe": [
        {"hidden_dim": 24, "experts": 4, "top_k": 2, "n_shared_experts": 1, "z_weight": 0.001},
        {"hidden_dim": 24, "experts": 5, "top_k": 1, "activation": "relu2", "balance": "squared"},
        {
            "hidden_dim": 24,
            "experts": 4,
            "top_k": 3,
            "norm_topk_prob": False,
            "balance": "sequence",
        },
    ],
    "deepseek_moe": [
        {
            "hidden_dim": 24,
            "experts": 8,
            "top_k": 3,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
        },
        {"hidden_dim": 24, "experts": 7, "top_k": 1, "activation": "relu2", "score": "softmax"},
    ],
    "dyn_moe": [
        {"hidden_dim": 24, "experts": 4},
        {
            "hidden_dim": 24,
            "experts": 6,
            "activation": "relu2",
            "combine": "sum",
            "fallback": "none",
        },
        {"hidden_dim": 24, "experts": 4, "combine": "rescaled_sum", "router_grad": "smk"},
    ],
    "plain": [{}],
    "hyper": [{"streams": 4}, {"streams": 2, "fracs": 2}, {"streams": 2, "dynamic": False}],
    "mhyper": [{"streams": 2}, {"streams": 4, "sinkhorn_iterations": 3}],
}


def _heads(mixer: Any, capacity: int) -> int:
    return (
        2
        * mixer.num_kv_heads
        * mixer.resolve_head_dim(DIM)
        * min(capacity, mixer.window or capacity)
    )


def _own(mixer: Any) -> int:
    return mixer.heads * (mixer.nope_dim + mixer.rope_dim + mixer.v_dim)


CACHE_SIZES: dict[str, Callable[[Any, int], int]] = {
    "gqa": _heads,
    "dyn_heads": lambda mixer, capacity: _heads(mixer.gqa_config, capacity),
    "dyn_lora": lambda mixer, capacity: _heads(mixer.base, capacity),
    "dsa": lambda mixer, capacity: (mixer.kv_rank + mixer.rope_dim + mixer.index_dim) * capacity,
    "hybrid": lambda mixer, capacity: sum(
        {
            "compress": (mixer.kv_rank + mixer.rope_dim)
            * (min(capacity, mixer.compress_block) + capacity // mixer.compress_block),
            "select": capacity * (_own(mixer) + mixer.index_dim),
            "window": min(capacity, mixer.window) * _own(mixer),
        }[branch]
        for branch in mixer.branch_names
    ),
    "mla": lambda mixer, capacity: (mixer.kv_rank + mixer.rope_dim) * capacity,
    "nsa": lambda mixer, capacity: (
        2
        * mixer.num_kv_heads
        * mixer.resolve_head_dim(DIM)
        * (
            capacity
            + min(capacity, mixer.window)
            + min(capacity, mixer.compress_block)
            + max((capacity - mixer.compress_block) // mixer.compress_stride + 1, 0)
        )
    ),
}
"""(config, capacity) -> numbers in a layer's cache per row."""

SELECTIVE = {
    *("dsa", "nsa", "hybrid", "dyn_heads", "dyn_lora"),
    *("topk_moe", "deepseek_moe", "dyn_moe"),
}
"""Kinds that select tokens or experts. Rounding may change a selection, and what was not selected
has no influence on the output.
"""

ZERO_GRAD_AT_INIT: dict[str, str] = {"hyper": "residual.scale", "dyn_lora": "_delta.down"}
"""Kind -> suffix of the names of parameters whose gradient is exactly 0 at the first step.

`hyper`: the weights are s tanh(N W) + static with W initialised to 0, which makes it equal to the
plain residual. So ds = tanh(N W) = 0 at the first step. dW = s N is not 0, so s changes from the
second step on. All other parameters have gradients: A_m and A_r are unconstrained (their rows and
columns need not sum to 1 as those of mHC), so even if all streams are equal, each weight scales
what is read or kept.
`mhyper`: H_res of the first and last sub-layer has no effect, but its weights are rows of
parameters whose other rows have one. nn/test_mhyper.py tests the rows.
`dyn_lora`: the change is B A x with B initialised to 0, so dA = B' dy x' = 0 until B has changed.
"""

NOT_BITWISE_CAUSAL = {"nsa", "dyn_heads", "dyn_lora"}
"""Kinds that group tokens by what they select. The shape of a matrix product then depends on later
tokens, which may change the last bits of earlier outputs. They are causal to 1e-10, all others
exactly.
"""

NOT_TRUNCATABLE: set[str] = set()
"""Mixers whose cache raises CannotTruncate as soon as a row would lose a token, because they have a
recurrent state.
"""

TOKEN_CHOICE_FLOPS = {"dyn_heads", "dyn_lora", "dyn_moe"}
"""Kinds whose tokens decide how many experts they use. `flops` counts the target number, so random
weights use another number of operations. Unit tests compare their `flops` with formulas.
"""

DEFAULTS = {
    "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2},
    "feed_forward": {"kind": "swiglu", "hidden_dim": 48},
    "residual": {"kind": "plain"},
}

USUAL = {"gqa-kv_heads=2", "plain", "topk_moe-experts=4-top_k=2-n_shared_experts=1-z_weight=0.001"}
"""Usual partners: every mixer runs with the plain residual and this mixture of experts, every
residual and feed-forward with this mixer.
"""

COMBINATIONS = [
    ("gqa-window=5", "swiglu", "hyper-streams=4"),
    ("gqa-sinks", "relu2", "mhyper-streams=2"),
    (
        "gqa-kv_heads=2-value_residual",
        "dyn_moe-experts=4",
        "mhyper-streams=4-sinkhorn_iterations=3",
    ),
    ("mla", "deepseek_moe-experts=7-top_k=1", "hyper-streams=2-fracs=2"),
    ("mla", "dyn_moe-experts=4-combine=rescaled_sum-router_grad=smk", "mhyper-streams=2"),
    ("dsa", "deepseek_moe-experts=8-top_k=3", "hyper-streams=4"),
    ("dsa", "topk_moe-experts=5-top_k=1", "mhyper-streams=4-sinkhorn_iterations=3"),
    ("hybrid", "deepseek_moe-experts=7-top_k=1", "mhyper-streams=4-sinkhorn_iterations=3"),
    ("hybrid", "relu2", "hyper-streams=2-dynamic=False"),
    ("nsa", "deepseek_moe-experts=8-top_k=3", "mhyper-streams=2"),
    ("nsa", "swiglu-bias", "hyper-streams=2-fracs=2"),
    ("dyn_heads", "dyn_moe-experts=6", "hyper-streams=4"),
    ("dyn_lora", "topk_moe-experts=4-top_k=3", "mhyper-streams=2"),
]
"""Further (mixer, feed-forward, residual), each by the beginning of a sample's name."""

"""The models that are compared: six mixers times three residual connections, with equal numbers of
parameters.
"""

from typing import Any

import torch

from tinsmith import LM, ModelConfig

MIXERS = ("dense", "window", "mla", "nsa", "dsa", "hybrid")
RESIDUALS: dict[str, dict[str, Any]] = {
    "plain": {"kind": "plain"},
    "hyper": {"kind": "hyper", "streams": 4},
    "mhyper": {"kind": "mhyper", "streams": 4},
}


def mixer(name: str, dim: int, reach: int) -> dict[str, Any]:
    """Return a mixer of four heads at width `dim`; sparse ones attend to about `reach` tokens."""
    heads = {"heads": 4, "kv_heads": 2}
    latent = {
        **{"heads": 4, "kv_rank": dim // 4, "q_rank": dim // 2, "nope_dim": dim // 8},
        **{"rope_dim": dim // 8, "v_dim": dim // 4},
    }
    index = {"index_heads": 4, "index_dim": dim // 8}
    block = reach // 4
    return {
        "dense": {"kind": "gqa", **heads},
        "window": {"kind": "gqa", **heads, "window": reach},
        "mla": {"kind": "mla", **latent},
        "nsa": {
            **{"kind": "nsa", **heads, "compress_block": block, "compress_stride": block // 2},
            # the first block, the query's own and the one before are always selected: one is free
            **{"select_block": block, "select_count": 4, "window": reach // 2},
        },
        "dsa": {"kind": "dsa", **latent, **index, "index_topk": reach},
        "hybrid": {
            **{"kind": "hybrid", "mode": "nsa", **latent, **index},
            **{"compress_block": block // 2, "index_topk": reach // 2, "window": reach // 2},
        },
    }[name]


def model(case: tuple[str, str], sizes: dict[str, Any], reach: int, budget: int) -> dict[str, Any]:
    """Return the `model:` section of a case with feed-forwards that fill `budget` parameters."""
    name, residual = case
    dim = sizes["dim"]

    def section(hidden: int) -> dict[str, Any]:
        layer = {
            "mixer": mixer(name, dim, reach),
            "feed_forward": {"kind": "relu2", "hidden_dim": hidden},
        }
        return sizes | {"residual": RESIDUALS[residual], "pattern": [layer]}

    step = 8
    remaining = budget - count(section(step))
    params_per_step = 2 * dim * step * sizes["depth"]
    return section(step * (1 + round(remaining / params_per_step)))


def count(section: dict[str, Any]) -> int:
    """Return the number of parameters of a `model:` section."""
    with torch.device("meta"):
        return LM(ModelConfig.from_dict(section)).parameter_count()

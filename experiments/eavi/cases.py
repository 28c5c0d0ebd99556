"""What is compared: three models, and three ways to go on from each after one stage of teacher
forcing.
"""

from typing import Any

from tinsmith.data.arc.generators import Sizes, held_out_compositions

Section = dict[str, Any]

RULES = ("recolour", "swap", "keep", "fill", "frame", "swap+fill", "keep+fill")
"""Of the tasks to train on; `HELD` are rules of the same kinds that no run is trained on."""
HELD = tuple(held_out_compositions(RULES))
SIZES = Sizes(smallest=3, largest=3, demonstrations=2)
CONTEXT = 96
"""Positions of a task."""
ROWS = 40
"""Tasks of a step."""
START = 300
"""Steps of stage one."""
STEPS = 60
"""Steps of stage two, of teacher forcing as of EAVI."""
SEEN_TASKS, HELD_TASKS = 140, 200
"""Of an examination."""

NSA = {
    **{"kind": "nsa", "heads": 4, "kv_heads": 1, "compress_block": 16, "compress_stride": 16},
    **{"select_block": 16, "select_count": 4, "window": 48},
}
DYN_MOE = {
    **{"kind": "dyn_moe", "experts": 8, "hidden_dim": 64, "target_active": 2, "sdl_weight": 0.1},
    **{"reset_interval": 100},
}
TOPK = {"kind": "topk_moe", "experts": 8, "top_k": 2, "hidden_dim": 64}
MODELS = {
    "minutes": {"mixer": NSA, "feed_forward": DYN_MOE},
    "topk": {"mixer": NSA, "feed_forward": TOPK},
    "dense": {
        "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 1},
        "feed_forward": {"kind": "swiglu", "hidden_dim": 128},
    },
}
"""The model of the minutes, the same with a plain top-k gate, and full attention without experts: a
token meets feed-forwards of width 128 in all.
"""
WAYS: dict[str, Section] = {
    "soft": {"kind": "eavi", "excursion": "soft"},
    "hard": {"kind": "eavi", "excursion": "hard"},
    "teacher": {"kind": "sft", "reads": "answers"},
}
"""How a model goes on. `teacher` comes last: it goes on as long as `soft` took."""


def start(model: str, seed: int, steps: int) -> Section:
    """Stage one."""
    shape = {"vocab_size": 18, "dim": 64, "depth": 3, "max_seq_len": 256}
    return {
        "model": shape | {"pattern": [MODELS[model]]},
        "data": data(seed, 2 * steps * ROWS // 3),
        "objective": WAYS["teacher"],
        "optim": rates(0.02, 3.0e-3) | {"schedule": {"kind": "wsd", "warmup": 20, "decay": 0.2}},
        **_run(steps, seed),
    }


def second(way: str, begun: str, seed: int, steps: int, save_every: int) -> Section:
    """Stage two from the model in `begun`, on new tasks of the same rules, none of them twice."""
    return {
        "init_from": begun,
        "data": data(1000 + seed, 2 * steps * ROWS),
        "objective": WAYS[way],
        "optim": rates(2.0e-3, 5.0e-4) | {"schedule": {"kind": "constant"}},
        **_run(steps, seed, save_every),
    }


def data(seed: int, count: int) -> Section:
    """Generated tasks."""
    return {
        **{"kind": "arc", "count": count, "seed": seed, "rules": list(RULES)},
        **{"min_grid_size": SIZES.smallest, "max_grid_size": SIZES.largest},
        **{"demonstrations": SIZES.demonstrations, "validation": 0.05},
    }


def rates(matrices: float, others: float) -> Section:
    """Learning rates."""
    return {
        "matrices": {"kind": "muon", "lr": matrices},
        "others": {"kind": "adamw", "lr": others},
    }


def _run(steps: int, seed: int, save_every: int = 100_000) -> Section:
    """So many steps, and no look at anything on the way."""
    train = {
        "steps": steps,
        "seq_len": CONTEXT,
        "batch_size": ROWS,
        "precision": "fp32",
        "seed": seed,
    }
    train |= {"save_every": save_every, "eval_every": 100_000, "sample_every": 100_000}
    # all are kept: the one of equal tasks may be an early one
    train |= {"keep": {"last": steps, "best": False}}
    return {"train": train, "eval": {"max_samples": 8, "max_new_tokens": 4}, "log": {"every": 1}}

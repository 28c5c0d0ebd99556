"""The runs that are compared: three models, each trained by teacher forcing in stage one and in
three ways in stage two.
"""

from typing import Any

from tinsmith.data.arc.generators import Sizes, held_out_compositions

Section = dict[str, Any]

RULES = ("recolour", "swap", "keep", "fill", "frame", "swap+fill", "keep+fill")
"""Rules of training tasks. `HELD` are compositions of them on which no run is trained."""
HELD = tuple(held_out_compositions(RULES))
SIZES = Sizes(smallest=3, largest=3, demonstrations=2)
SEQ_LEN = 96
"""Tokens of a task."""
BATCH_SIZE = 40
"""Tasks of a step."""
START = 300
"""Steps of stage one."""
STEPS = 60
"""Steps of stage two, the same for teacher forcing and EAVI."""
SEEN_TASKS, HELD_TASKS = 140, 200
"""Numbers of tasks for evaluation."""

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
"""`minutes` is NSA with dynamic experts, `topk` NSA with a top-k router, `dense` full attention
without experts. The active feed-forwards of a token have width 128 in all three.
"""
WAYS: dict[str, Section] = {
    "soft": {"kind": "eavi", "excursion": "soft"},
    "hard": {"kind": "eavi", "excursion": "hard"},
    "teacher": {"kind": "sft", "reads": "answers"},
}
"""Objectives of stage two. `teacher` comes last because it also trains for the time of `soft`."""


def start(model: str, seed: int, steps: int) -> Section:
    """Return the recipe of stage one."""
    shape = {"vocab_size": 18, "dim": 64, "depth": 3, "max_seq_len": 256}
    return {
        "model": shape | {"pattern": [MODELS[model]]},
        "data": data(seed, 2 * steps * BATCH_SIZE // 3),
        "objective": WAYS["teacher"],
        "optim": rates(0.02, 3.0e-3) | {"schedule": {"kind": "wsd", "warmup": 20, "decay": 0.2}},
        **_run(steps, seed),
    }


def second(way: str, first: str, seed: int, steps: int, save_every: int) -> Section:
    """Return the recipe of stage two from the run `first`, on new tasks of the same rules."""
    return {
        "init_from": first,
        "data": data(1000 + seed, 2 * steps * BATCH_SIZE),
        "objective": WAYS[way],
        "optim": rates(2.0e-3, 5.0e-4) | {"schedule": {"kind": "constant"}},
        **_run(steps, seed, save_every),
    }


def data(seed: int, count: int) -> Section:
    """Return a `data:` section of generated tasks."""
    return {
        **{"kind": "arc", "count": count, "seed": seed, "rules": list(RULES)},
        **{"min_grid_size": SIZES.smallest, "max_grid_size": SIZES.largest},
        **{"demonstrations": SIZES.demonstrations, "validation": 0.05},
    }


def rates(matrices: float, others: float) -> Section:
    """Return optimizers with these learning rates."""
    return {
        "matrices": {"kind": "muon", "lr": matrices},
        "others": {"kind": "adamw", "lr": others},
    }


def _run(steps: int, seed: int, save_every: int = 100_000) -> Section:
    """Return sections for so many steps without evaluation and samples in between."""
    train = {
        "steps": steps,
        "seq_len": SEQ_LEN,
        "batch_size": BATCH_SIZE,
        "precision": "fp32",
        "seed": seed,
    }
    train |= {"save_every": save_every, "eval_every": 100_000, "sample_every": 100_000}
    # all checkpoints are kept: the one after an equal number of tasks may be early
    train |= {"keep": {"last": steps, "best": False}}
    return {"train": train, "eval": {"max_samples": 8, "max_new_tokens": 4}, "log": {"every": 1}}

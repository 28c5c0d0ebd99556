"""The students that are compared. Most have all of the teacher except its feed-forwards, frozen
(the skeleton), and train new feed-forwards: dense ones, or 16 experts, together as wide as the
teacher's, of which 8 are active. The students "from nothing" train all parameters from random
weights.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tinsmith.hub.hf import export_folder
from tinsmith.hub.load import load
from tinsmith.hub.transplant import ExpertInit, TransplantPlan, build_transplant, transplant_config
from tinsmith.nn.config import ModelConfig
from tinsmith.nn.parameters import ALL_PARAMETERS

Section = dict[str, Any]

HIDDEN, EXPERTS, ACTIVE = 384, 16, 8
RESETS = 50
"""`reset_interval` of the runs, which are shorter than the published 1,000 steps."""
SDL = 0.1
"""Weight of the loss that keeps the number of active experts at its target. It is ten times the
published one for these short runs; the page has the number that was reached.
"""
LAYER: Section = {
    "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2, "qk_norm": True},
    "feed_forward": {"kind": "swiglu", "hidden_dim": HIDDEN},
}
TEACHER: Section = {
    **{"vocab_size": 1024, "dim": 128, "depth": 4, "max_seq_len": 256, "rope": {"theta": 1e4}},
    "pattern": [LAYER],
}
TOPK: Section = {"kind": "topk_moe", "experts": EXPERTS, "top_k": ACTIVE}


class Case(NamedTuple):
    """Config of a student: its feed-forward, initialisation and objective."""

    feed: Section
    init: ExpertInit = "random"
    skeleton: bool = True
    """If True, use the teacher's frozen skeleton, otherwise train all parameters from scratch."""
    distilled: bool = True
    """If True, train on the teacher's distribution (KD), otherwise on the text only."""
    longer: bool = False
    """If True, add the teacher's number of steps, which a skeleton has been trained for."""


def dyn(router: str = "task") -> Section:
    """Return a `dyn_moe` section, which selects experts by thresholds."""
    common = {"target_active": ACTIVE, "sdl_weight": SDL, "reset_interval": RESETS}
    return {"kind": "dyn_moe", "experts": EXPERTS, "router_grad": router} | common


CASES: dict[str, Case] = {
    "dense": Case({"kind": "swiglu"}),
    "half dense": Case({"kind": "swiglu", "hidden_dim": HIDDEN // 2}),
    "topk_moe": Case(TOPK),
    "dyn_moe task": Case(dyn()),
    "dyn_moe smk": Case(dyn("smk")),
    "dyn_moe sml": Case(dyn("sml")),
    "dyn_moe both": Case(dyn("both")),
    "dyn_moe task, slices": Case(dyn(), init="slice"),
    "from nothing, taught": Case(dyn(), skeleton=False),
    "from nothing, text": Case(dyn(), skeleton=False, distilled=False),
    "from nothing, longer": Case(dyn(), skeleton=False, distilled=False, longer=True),
}
GROUPS = {
    "Does a router trained on surprise match one trained on the task?": (
        *("topk_moe", "dyn_moe task", "dyn_moe smk", "dyn_moe sml", "dyn_moe both"),
    ),
    "Does a sparse student reach its dense teacher at half the active parameters?": (
        *("dense", "half dense", "topk_moe", "dyn_moe task", "dyn_moe smk"),
    ),
    "Random experts or slices of the teacher's?": ("dyn_moe task", "dyn_moe task, slices"),
    "Does the frozen skeleton beat the same shape from nothing?": (
        *("dyn_moe task", "from nothing, taught", "from nothing, text", "from nothing, longer"),
    ),
}
"""Title -> cases; a case may be in several groups."""


def initial_model(case: Case, teacher: Path, folder: Path, seed: int) -> Section:
    """Return the sections of a student's recipe for its initial model. A transplant is written to
    `folder`.
    """
    if not case.skeleton:
        shape = transplant_config(ModelConfig.from_dict(TEACHER), TransplantPlan(case.feed))
        whole = replace(shape, trainable=ALL_PARAMETERS).to_dict()
        return {"model": whole, "tokenizer": {"path": str(teacher / "final")}}
    lm, tokenizer = load(teacher)
    torch.manual_seed(seed)
    export_folder(build_transplant(lm, TransplantPlan(case.feed, case.init)), tokenizer, folder)
    return {"init_from": str(folder)}


def objective(case: Case, teacher: Path) -> Section:
    """Return the `objective:` section of a student."""
    if not case.distilled:
        return {"kind": "pretrain"}
    return {"kind": "kd", "teacher": str(teacher), "reads": "documents"}

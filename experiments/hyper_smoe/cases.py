"""The students that are compared. All but those from nothing stand in their teacher's skeleton,
frozen, with new feed-forwards: 16 experts, together of the teacher's width, of which 8 act; or
dense ones.
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
"""Optimizer steps between looks for dead experts: the published 1,000 are more than a run has."""
SDL = 0.1
"""Weight of the loss that holds the number of experts at its aim: ten times the published one, for
runs this short; the page says how many there were.
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
    """A student."""

    feed: Section
    init: ExpertInit = "random"
    skeleton: bool = True
    """Whether it has its teacher's skeleton, frozen; else it begins from nothing, all trained."""
    taught: bool = True
    """Whether a teacher's soft labels are learned, or the text alone."""
    older: bool = False
    """Whether the steps that its teacher had are added: what a skeleton has cost before."""


def dyn(router: str = "task") -> Section:
    """Experts by thresholds."""
    usual = {"target_active": ACTIVE, "sdl_weight": SDL, "reset_interval": RESETS}
    return {"kind": "dyn_moe", "experts": EXPERTS, "router_grad": router} | usual


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
    "from nothing, text": Case(dyn(), skeleton=False, taught=False),
    "from nothing, longer": Case(dyn(), skeleton=False, taught=False, older=True),
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
"""Title -> cases; some stand in several."""


def begin(case: Case, teacher: Path, folder: Path, seed: int) -> Section:
    """The sections of a student's recipe that say what it begins with; `folder` gets its
    transplant.
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
    """What it learns from."""
    if not case.taught:
        return {"kind": "pretrain"}
    return {"kind": "kd", "teacher": str(teacher), "reads": "documents"}

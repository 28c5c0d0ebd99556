"""A dense model's skeleton with experts in the place of its feed-forwards (Tiny-ONN Hyper-SMoE).

Embedding, head, mixers and norms are the dense model's, and frozen; experts and their gates are
new, and all that is trained. No tensor of a dense feed-forward remains. By default 32 experts share
the width of the dense layer, and half of them are to work on a token (`dyn_moe`: half of them do at
first). Experts begin as `random` (the model's own initialisation) or as `slice`: expert e is the
e-th slice of the dense layer's hidden units, so that all experts together, each counted once
(`combine: sum`; with all of them on also `rescaled_sum`), say exactly what the dense layer said. A
new dense layer (`kind` is the model's own) is what experts are compared with; it begins at random.

Legend: I hidden units of a dense layer, E experts, H hidden units of an expert, D width.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tinsmith.core.errors import UserError
from tinsmith.core.parse import parse
from tinsmith.nn.config import Layer, ModelConfig
from tinsmith.nn.feedforwards import FeedForwardConfig
from tinsmith.nn.feedforwards.deepseek import DeepSeekFeedForward, DeepSeekMoE
from tinsmith.nn.feedforwards.dense import ReLU2, ReLU2FeedForward, SwiGLU, SwiGLUFeedForward
from tinsmith.nn.feedforwards.dynmoe import DynMoE, DynMoEFeedForward
from tinsmith.nn.feedforwards.topk import TopKFeedForward, TopKMoE
from tinsmith.nn.model import LM

ExpertInit = Literal["random", "slice"]
Section = dict[str, Any]
Dense = SwiGLU | ReLU2
Sparse = DynMoE | TopKMoE | DeepSeekMoE

FEED_FORWARD_PATTERN = "blocks.*.feed"
NORM_PATTERN = "*norm"
DEFAULT_NUM_EXPERTS = 32
_FEED = re.compile(r"blocks\.\d+\.feed\..*")

_USUAL: dict[str, Callable[[int], Section]] = {
    "dyn_moe": lambda experts: {"target_active": experts / 2, "combine": "rescaled_sum"},
    "topk_moe": lambda experts: {"top_k": max(1, experts // 2)},
    "deepseek_moe": lambda experts: {"top_k": max(1, experts // 2), "n_shared_experts": 0},
}
"""The keys of each kind of experts beside `experts`, `hidden_dim` and `activation`."""


class TransplantPlan(NamedTuple):
    """What is asked of a transplant."""

    feed_forward: Section
    """Keys of the new feed-forward: `kind` and whatever is not as usual."""
    init: ExpertInit = "random"
    train_norms: bool = False


def transplant_config(dense: ModelConfig, plan: TransplantPlan) -> ModelConfig:
    """The sparse model's config; UserError where there is no such transplant."""

    def layers(each: tuple[Layer, ...]) -> tuple[Layer, ...]:
        return tuple(replace(layer, feed_forward=_feed_for(layer, plan)) for layer in each)

    trained = (FEED_FORWARD_PATTERN, NORM_PATTERN) if plan.train_norms else (FEED_FORWARD_PATTERN,)
    return replace(
        dense,
        first=layers(dense.first),
        pattern=layers(dense.pattern),
        last=layers(dense.last),
        trainable=trained,
    )


def _feed_for(layer: Layer, plan: TransplantPlan) -> Sparse | Dense:
    dense, kind = layer.feed_forward, plan.feed_forward.get("kind", "dyn_moe")
    if not isinstance(dense, Dense):
        raise UserError(f"transplant: the model's feed-forward is {dense.kind}, not a dense one")
    if dense.bias:
        raise UserError("transplant: the model's feed-forward has biases, experts have none")
    if kind == dense.kind:  # what sparse ones are compared with
        if plan.init == "slice":
            raise UserError(f"transplant: init=slice: a dense layer of {kind=!s} has no experts")
        return parse(
            FeedForwardConfig, {"hidden_dim": dense.hidden_dim} | plan.feed_forward, "transplant"
        )
    if not isinstance(kind, str) or kind not in _USUAL:
        raise UserError(f"transplant: kind={kind!r:.60} is not one of {', '.join(_USUAL)}")
    return _experts_for(dense, plan, kind)


def _experts_for(dense: Dense, plan: TransplantPlan, kind: str) -> Sparse:
    requested = {"kind": kind, "experts": DEFAULT_NUM_EXPERTS} | plan.feed_forward
    experts = requested["experts"]
    if type(experts) is not int or experts < 1:
        raise UserError(f"transplant: experts={experts!r:.60} must be at least 1")
    usual = {"hidden_dim": max(1, dense.hidden_dim // experts), "activation": dense.kind}
    sparse = parse(FeedForwardConfig, usual | _USUAL[kind](experts) | requested, "transplant")
    if sparse.activation != dense.kind:
        raise UserError(f"transplant: activation={sparse.activation}, the model's is {dense.kind}")
    if dense.hidden_dim % experts and "hidden_dim" not in requested:
        units = f"{dense.hidden_dim} hidden units"
        raise UserError(
            f"transplant: {experts} experts do not share {units} evenly; give `hidden_dim`"
        )
    if plan.init == "slice":
        _check_slices(dense, sparse)
    return sparse


def _check_slices(dense: Dense, sparse: Sparse) -> None:
    units = sparse.experts * sparse.hidden_dim
    if units != dense.hidden_dim:
        sizes = f"{sparse.experts} experts of width {sparse.hidden_dim} have {units} hidden units"
        raise UserError(f"transplant: init=slice: {sizes}, the dense layer has {dense.hidden_dim}")
    if not isinstance(sparse, DynMoE) and sparse.n_shared_experts:
        raise UserError(
            f"transplant: init=slice: n_shared_experts={sparse.n_shared_experts} must be 0"
        )


def build_transplant(dense: LM, plan: TransplantPlan) -> LM:
    """The sparse model, in eval mode, in the dtype and on the device of `dense`, with which it
    shares no memory. New tensors are drawn from torch's global generator.
    """
    student = LM(transplant_config(dense.config, plan))
    student.to(dense.embed.weight.device, dense.embed.weight.dtype)
    kept = {name: t for name, t in dense.state_dict().items() if not _FEED.fullmatch(name)}
    missing, unexpected = student.load_state_dict(kept, strict=False)
    assert not unexpected, unexpected
    assert all(_FEED.fullmatch(name) for name in missing), missing
    if plan.init == "slice":
        for ours, theirs in zip(student.blocks, dense.blocks, strict=True):
            _slice(ours.feed, theirs.feed)
    return student.eval()


@torch.no_grad()
def _slice(sparse: nn.Module, dense: nn.Module) -> None:
    """Give every expert its part of the dense layer."""
    assert isinstance(sparse, DynMoEFeedForward | TopKFeedForward | DeepSeekFeedForward)
    assert isinstance(dense, SwiGLUFeedForward | ReLU2FeedForward)
    experts = sparse.experts
    count = len(experts.up_proj.weight)
    if experts.gate_proj is not None and isinstance(dense, SwiGLUFeedForward):
        experts.gate_proj.weight.copy_(_rows(dense.gate_proj.weight, count))
    experts.up_proj.weight.copy_(_rows(dense.up_proj.weight, count))
    experts.down_proj.weight.copy_(_rows(dense.down_proj.weight.mT, count).mT)


def _rows(weight_ID: Tensor, experts: int) -> Tensor:
    """(I, D) -> (E, H, D)."""
    return weight_ID.unflatten(0, (experts, -1))


class ParameterCount(NamedTuple):
    """Tensors of one sort, all of them trained or none."""

    name: str
    num_parameters: int
    trainable: bool


def parameter_table(config: ModelConfig) -> list[ParameterCount]:
    """What a model consists of, by sorts of tensors; no memory is taken."""
    with torch.device("meta"):
        lm = LM(config)
    found: dict[tuple[str, bool], int] = {}
    for name, parameter in lm.named_parameters():
        sort = _sort(name), parameter.requires_grad
        found[sort] = found.get(sort, 0) + parameter.numel()
    return [ParameterCount(name, count, trained) for (name, trained), count in found.items()]


def _sort(name: str) -> str:
    for sort, pattern in _SORTS.items():
        if re.search(pattern, name):
            return sort
    return "other"


_SORTS = {
    "embedding": r"^embed\.|^places\.",
    "head": r"^head\.",
    "attention": r"\.mixer\.",
    "experts": r"\.feed\.(experts|shared)\.",
    "thresholds": r"\.feed\.gate\.thresholds",
    "gates": r"\.feed\.(gate|router)\.",
    "dense feed-forward": r"\.feed\.",
    "norms": r"norm\.weight$|norm\.bias$",
}
"""What the rows of a table count, by names; the first that fits."""

"""Replace a dense model's feed-forwards by experts, keep the rest frozen (Tiny-ONN Hyper-SMoE).

Embedding, head, mixers and norms are copied from the dense model and frozen; experts and their
gates are new, and only they are trained. No tensor of a dense feed-forward is used, except with
`init: slice`. By default 32 experts share the width of the dense layer, and half of them act on a
token (`dyn_moe`: half of them at the start). Experts are initialised as `random` (the model's own
initialisation) or as `slice`: expert e is the e-th slice of the dense layer's hidden units, so the
sum of all experts with weight 1 (`combine: sum`; with all experts active also `rescaled_sum`)
equals the output of the dense layer. A new dense layer (`kind` is the model's own) is the baseline
of experiments; it is initialised at random.

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
from tinsmith.nn.feedforwards.dense import ReLU2, SwiGLU
from tinsmith.nn.feedforwards.dynmoe import DynMoE, DynMoEFeedForward
from tinsmith.nn.feedforwards.topk import TopKFeedForward, TopKMoE
from tinsmith.nn.layers.mlp import ReLU2FeedForward, SwiGLUFeedForward
from tinsmith.nn.model import LM

ExpertInit = Literal["random", "slice"]
Section = dict[str, Any]
Dense = SwiGLU | ReLU2
Sparse = DynMoE | TopKMoE | DeepSeekMoE

FEED_FORWARD_PATTERN = "blocks.*.feed"
NORM_PATTERN = "*norm"
DEFAULT_NUM_EXPERTS = 32
_FEED_FORWARD_NAME = re.compile(r"blocks\.\d+\.feed\..*")

_DEFAULT_KEYS: dict[str, Callable[[int], Section]] = {
    "dyn_moe": lambda experts: {"target_active": experts / 2, "combine": "rescaled_sum"},
    "topk_moe": lambda experts: {"top_k": max(1, experts // 2)},
    "deepseek_moe": lambda experts: {"top_k": max(1, experts // 2), "n_shared_experts": 0},
}
"""Default keys of each kind of experts, except `experts`, `hidden_dim` and `activation`."""


class TransplantPlan(NamedTuple):
    """The feed-forward of a transplant and how it is initialised."""

    feed_forward: Section
    """Keys of the new feed-forward: `kind`, and keys that differ from the defaults."""
    init: ExpertInit = "random"
    train_norms: bool = False


def transplant_config(dense: ModelConfig, plan: TransplantPlan) -> ModelConfig:
    """Return the sparse model's config; UserError if the transplant is not possible."""

    def layers(dense_layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
        return tuple(
            replace(layer, feed_forward=_new_feed_forward(layer, plan)) for layer in dense_layers
        )

    trainable = (
        (FEED_FORWARD_PATTERN, NORM_PATTERN) if plan.train_norms else (FEED_FORWARD_PATTERN,)
    )
    return replace(
        dense,
        first=layers(dense.first),
        pattern=layers(dense.pattern),
        last=layers(dense.last),
        trainable=trainable,
    )


def _new_feed_forward(layer: Layer, plan: TransplantPlan) -> Sparse | Dense:
    dense, kind = layer.feed_forward, plan.feed_forward.get("kind", "dyn_moe")
    if not isinstance(dense, Dense):
        raise UserError(f"transplant: the model's feed-forward is {dense.kind}, not a dense one")
    if dense.bias:
        raise UserError("transplant: the model's feed-forward has biases, experts have none")
    if kind == dense.kind:  # the dense baseline
        if plan.init == "slice":
            raise UserError(f"transplant: init=slice: a dense layer of {kind=!s} has no experts")
        return parse(
            FeedForwardConfig, {"hidden_dim": dense.hidden_dim} | plan.feed_forward, "transplant"
        )
    if not isinstance(kind, str) or kind not in _DEFAULT_KEYS:
        raise UserError(f"transplant: kind={kind!r:.60} is not one of {', '.join(_DEFAULT_KEYS)}")
    return _new_experts(dense, plan, kind)


def _new_experts(dense: Dense, plan: TransplantPlan, kind: str) -> Sparse:
    section = {"kind": kind, "experts": DEFAULT_NUM_EXPERTS} | plan.feed_forward
    experts = section["experts"]
    if type(experts) is not int or experts < 1:
        raise UserError(f"transplant: experts={experts!r:.60} must be at least 1")
    defaults = {"hidden_dim": max(1, dense.hidden_dim // experts), "activation": dense.kind}
    sparse = parse(
        FeedForwardConfig, defaults | _DEFAULT_KEYS[kind](experts) | section, "transplant"
    )
    if sparse.activation != dense.kind:
        raise UserError(f"transplant: activation={sparse.activation}, the model's is {dense.kind}")
    if dense.hidden_dim % experts and "hidden_dim" not in section:
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
    """Build the sparse model in eval mode, with the dtype and device of `dense`.

    The two models share no memory. New tensors are drawn from torch's global generator.
    """
    sparse = LM(transplant_config(dense.config, plan))
    sparse.to(dense.embed.weight.device, dense.embed.weight.dtype)
    copied = {
        name: tensor
        for name, tensor in dense.state_dict().items()
        if not _FEED_FORWARD_NAME.fullmatch(name)
    }
    missing, unexpected = sparse.load_state_dict(copied, strict=False)
    assert not unexpected, unexpected
    assert all(_FEED_FORWARD_NAME.fullmatch(name) for name in missing), missing
    if plan.init == "slice":
        for sparse_block, dense_block in zip(sparse.blocks, dense.blocks, strict=True):
            _copy_slices(sparse_block.feed, dense_block.feed)
    return sparse.eval()


@torch.no_grad()
def _copy_slices(sparse: nn.Module, dense: nn.Module) -> None:
    """Copy to every expert its slice of the dense layer's hidden units."""
    assert isinstance(sparse, DynMoEFeedForward | TopKFeedForward | DeepSeekFeedForward)
    assert isinstance(dense, SwiGLUFeedForward | ReLU2FeedForward)
    experts = sparse.experts
    count = len(experts.up_proj.weight)
    if experts.gate_proj is not None and isinstance(dense, SwiGLUFeedForward):
        experts.gate_proj.weight.copy_(_split_rows(dense.gate_proj.weight, count))
    experts.up_proj.weight.copy_(_split_rows(dense.up_proj.weight, count))
    experts.down_proj.weight.copy_(_split_rows(dense.down_proj.weight.mT, count).mT)


def _split_rows(weight_ID: Tensor, experts: int) -> Tensor:
    """(I, D) -> (E, H, D)."""
    return weight_ID.unflatten(0, (experts, -1))


class ParameterCount(NamedTuple):
    """A group of parameters that are all trainable or all frozen."""

    name: str
    num_parameters: int
    trainable: bool


def parameter_table(config: ModelConfig) -> list[ParameterCount]:
    """Count a model's parameters by group, on the meta device."""
    with torch.device("meta"):
        lm = LM(config)
    counts: dict[tuple[str, bool], int] = {}
    for name, parameter in lm.named_parameters():
        group = _group_name(name), parameter.requires_grad
        counts[group] = counts.get(group, 0) + parameter.numel()
    return [ParameterCount(name, count, trainable) for (name, trainable), count in counts.items()]


def _group_name(name: str) -> str:
    for group, pattern in _PARAMETER_GROUPS.items():
        if re.search(pattern, name):
            return group
    return "other"


_PARAMETER_GROUPS = {
    "embedding": r"^embed\.|^places\.",
    "head": r"^head\.",
    "attention": r"\.mixer\.",
    "experts": r"\.feed\.(experts|shared)\.",
    "thresholds": r"\.feed\.gate\.thresholds",
    "gates": r"\.feed\.(gate|router)\.",
    "dense feed-forward": r"\.feed\.",
    "norms": r"norm\.weight$|norm\.bias$",
}
"""Groups of parameters by a pattern of their names; the first match counts."""

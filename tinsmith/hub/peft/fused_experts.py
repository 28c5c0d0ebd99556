"""Translate adapters of experts to the fused gate and up projections of transformers 5.

In stock families, gate and up projections of all experts of a layer are one parameter in memory,
which is the one that PEFT adapts:

    experts.gate_proj.weight (E, H, D), experts.up_proj.weight (E, H, D)
        <->  experts.gate_up_proj (E, 2H, D)

An adapter of the fused parameter has one A for both, so reading it gives two adapters that share A.
Writing two adapters of rank R gives one of rank 2R, exactly: their A's are concatenated and B is
block-diagonal. A file has one rank, so the adapters of all other weights are padded with zeros, and
alpha is increased to keep the scaling.

Legend: E experts, R rank, H width of an expert, D width of the model.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.nn.functional import pad

from tinsmith.nn.lora import LoRA, LoRAWeights

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3")
_STACK = re.compile(r"(blocks\.\d+\.feed\.experts)\.(gate|up|down)_proj\.weight")
_FUSED = re.compile(r"blocks\.(\d+)\.feed\.experts\.(gate_up|down)_proj")
_FUSED_PROJECTIONS = ("gate", "up")

Shape = tuple[int, ...]


def hf_name(name: str) -> str | None:
    """Return transformers' name of a stack in `fused_shapes`; None for other weights."""
    match = _FUSED.fullmatch(name)
    return match and f"model.layers.{match[1]}.mlp.experts.{match[2]}_proj"


def fused_shapes(weight_shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the shapes of a model's weights after fusing gate and up projections."""
    shapes: dict[str, Shape] = {}
    for name, shape in weight_shapes.items():
        match = _STACK.fullmatch(name)
        if match is None:
            shapes[name] = shape
        elif match[2] == "down":
            shapes[_fused_name(match[1], "down")] = shape
        else:
            count, rows, columns = shape
            shapes[_fused_name(match[1], "gate_up")] = (count, 2 * rows, columns)
    return shapes


def fuse_adapters(
    config: LoRA, pairs: Mapping[str, LoRAWeights], weight_shapes: Mapping[str, Shape]
) -> tuple[LoRA, dict[str, LoRAWeights]]:
    """Fuse the adapters of gate and up projections; `weight_shapes` are those before fusing."""
    fused: dict[str, LoRAWeights] = {}
    for name, pair in pairs.items():
        match = _STACK.fullmatch(name)
        if match is None:
            fused[name] = pair
        elif match[2] == "down":
            fused[_fused_name(match[1], "down")] = pair
        else:
            halves = [
                pairs.get(f"{match[1]}.{projection}_proj.weight")
                for projection in _FUSED_PROJECTIONS
            ]
            fused[_fused_name(match[1], "gate_up")] = _fuse(halves, weight_shapes[name][1])
    rank = max(pair.A.shape[-2] for pair in fused.values())
    alpha = config.scaling * (rank**0.5 if config.rslora else rank)
    padded = {name: _pad_rank(pair, rank) for name, pair in fused.items()}
    return replace(config, rank=rank, alpha=alpha), padded


def unfuse_adapters(pairs: Mapping[str, LoRAWeights]) -> dict[str, LoRAWeights]:
    """Split the adapters of fused stacks into those of gate and up projections."""
    split: dict[str, LoRAWeights] = {}
    for name, (A, B) in pairs.items():
        match = _FUSED.fullmatch(name)
        if match is None:
            split[name] = LoRAWeights(A, B)
        elif match[2] == "down":
            split[f"{name}.weight"] = LoRAWeights(A, B)
        else:
            experts = name.rpartition(".")[0]
            for projection, rows in zip(_FUSED_PROJECTIONS, B.chunk(2, 1), strict=True):
                split[f"{experts}.{projection}_proj.weight"] = LoRAWeights(A, rows)
    return split


def _fused_name(experts: str, projection: str) -> str:
    return f"{experts}.{projection}_proj"


def _fuse(halves: list[LoRAWeights | None], rows: int) -> LoRAWeights:
    """Fuse two adapters, one of which may be None: A (E, R or 2R, D), B (E, 2H, R or 2R)."""
    present = [(index, pair) for index, pair in enumerate(halves) if pair is not None]
    blocks = [pad(pair.B, (0, 0, index * rows, (1 - index) * rows)) for index, pair in present]
    return LoRAWeights(torch.cat([pair.A for _, pair in present], 1), torch.cat(blocks, 2))


def _pad_rank(pair: LoRAWeights, rank: int) -> LoRAWeights:
    missing = rank - pair.A.shape[-2]
    return LoRAWeights(pad(pair.A, (0, 0, 0, missing)), pad(pair.B, (0, missing)))

"""Experts as transformers 5 holds them in memory, which is where PEFT adapts them: of stock
families, gate and up of all experts of a layer are one stack.

experts.gate_proj.weight (E, H, D), experts.up_proj.weight (E, H, D)  <->  experts.gate_up_proj
                                                                           (E, 2H, D)
An adapter of the whole has one A for both, so read it is two that share it. Two of rank R are one
of rank 2R, exactly: A's one after the other, B block-diagonal. A file has one rank, so then those
of all other weights are filled up with zeros, and alpha grows, which leaves the scale as it was.

Legend: E experts, R rank, H and D the widths of a layer's experts and of the model.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.nn.functional import pad

from tinsmith.nn.lora import LoRA, LoRAWeights

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3")
_OURS = re.compile(r"(blocks\.\d+\.feed\.experts)\.(gate|up|down)_proj\.weight")
_FUSED = re.compile(r"blocks\.(\d+)\.feed\.experts\.(gate_up|down)_proj")
_HALVES = ("gate", "up")

Shape = tuple[int, ...]


def hf_name(name: str) -> str | None:
    """Where transformers has a stack, by the name that `shapes` gives it; None for others."""
    match = _FUSED.fullmatch(name)
    return match and f"model.layers.{match[1]}.mlp.experts.{match[2]}_proj"


def fused_shapes(ours: Mapping[str, Shape]) -> dict[str, Shape]:
    """The weights of a model with their sides, its stacks as transformers has them."""
    found: dict[str, Shape] = {}
    for name, sides in ours.items():
        match = _OURS.fullmatch(name)
        if match is None:
            found[name] = sides
        elif match[2] == "down":
            found[_whole(match[1], "down")] = sides
        else:
            count, rows, columns = sides
            found[_whole(match[1], "gate_up")] = (count, 2 * rows, columns)
    return found


def fuse_adapters(
    config: LoRA, pairs: Mapping[str, LoRAWeights], weight_shapes: Mapping[str, Shape]
) -> tuple[LoRA, dict[str, LoRAWeights]]:
    """Adapters of a model (the sides of its weights are `ours`) as those of its fused stacks."""
    found: dict[str, LoRAWeights] = {}
    for name, pair in pairs.items():
        match = _OURS.fullmatch(name)
        if match is None:
            found[name] = pair
        elif match[2] == "down":
            found[_whole(match[1], "down")] = pair
        else:
            halves = [pairs.get(f"{match[1]}.{half}_proj.weight") for half in _HALVES]
            found[_whole(match[1], "gate_up")] = _fused(halves, weight_shapes[name][1])
    rank = max(pair.A.shape[-2] for pair in found.values())
    grown = config.scaling * (rank**0.5 if config.rslora else rank)
    filled = {name: _filled(pair, rank) for name, pair in found.items()}
    return replace(config, rank=rank, alpha=grown), filled


def unfuse_adapters(pairs: Mapping[str, LoRAWeights]) -> dict[str, LoRAWeights]:
    """Adapters of fused stacks as those of the model's own."""
    found: dict[str, LoRAWeights] = {}
    for name, (A, B) in pairs.items():
        match = _FUSED.fullmatch(name)
        if match is None:
            found[name] = LoRAWeights(A, B)
        elif match[2] == "down":
            found[f"{name}.weight"] = LoRAWeights(A, B)
        else:
            owner = name.rpartition(".")[0]
            for half, rows in zip(_HALVES, B.chunk(2, 1), strict=True):
                found[f"{owner}.{half}_proj.weight"] = LoRAWeights(A, rows)
    return found


def _whole(owner: str, which: str) -> str:
    return f"{owner}.{which}_proj"


def _fused(halves: list[LoRAWeights | None], rows: int) -> LoRAWeights:
    """One adapter (E, R or 2R, D), (E, 2H, R or 2R) of the halves that there are."""
    there = [(place, pair) for place, pair in enumerate(halves) if pair is not None]
    blocks = [pad(pair.B, (0, 0, place * rows, (1 - place) * rows)) for place, pair in there]
    return LoRAWeights(torch.cat([pair.A for _, pair in there], 1), torch.cat(blocks, 2))


def _filled(pair: LoRAWeights, rank: int) -> LoRAWeights:
    more = rank - pair.A.shape[-2]
    return LoRAWeights(pad(pair.A, (0, 0, 0, more)), pad(pair.B, (0, more)))

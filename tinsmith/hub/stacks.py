"""Stacks of experts: Tinsmith keeps (E, O, I) in one tensor, Hugging Face's files one per expert.

blocks.3.feed.experts.up_proj.weight  <->  blocks.3.feed.experts.0.up_proj.weight, ...
"""

import re

import torch
from torch import Tensor

_STACK = re.compile(r"(.*\.feed\.experts)\.([a-z_]+\.weight)")
_SLICE = re.compile(r"(.*\.feed\.experts)\.(\d+)\.([a-z_]+\.weight)")


def apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every stack as one tensor per expert, views of it; the rest as it is."""
    parts: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _STACK.fullmatch(name)
        if match is None:
            parts[name] = tensor
        else:
            parts |= {f"{match[1]}.{e}.{match[2]}": matrix for e, matrix in enumerate(tensor)}
    return parts


def together(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `apart`."""
    whole: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        match = _SLICE.fullmatch(name)
        if match is None:
            whole[name] = tensor
        else:
            stacks.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
    return whole | {
        name: torch.stack([matrices[e] for e in range(len(matrices))])
        for name, matrices in stacks.items()
    }

"""A model from stored tensors: built without memory of its own, then given exactly those."""

import re

import torch
from torch import Tensor

from tinsmith.core.errors import UserError
from tinsmith.hub.names import Names
from tinsmith.hub.tensors import Stored, read_tensors
from tinsmith.nn import lora
from tinsmith.nn.lora import LoRA
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.nn.parts.exact import exact_names

_REDUNDANT = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Buffers of older transformers, which follow from the config."""

_EMBED, _HEAD = "embed.weight", "head.weight"


def fill(
    config: ModelConfig,
    found: dict[str, Stored],
    names: Names,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    where: str,
    adapted: LoRA | None = None,
) -> LM:
    """A model in eval mode whose tensors are those of a folder, by `names`; where adapters are
    among them, they are folded into the weights.

    UserError, naming the first tensor, where one is missing, of another shape, or not wanted.
    `dtype` is that of weights, None what the files have; buffers, and what decides, always keep it.
    """
    with torch.device("meta"):
        lm, shapes = LM(config), _shapes(config, names, adapted)
    wanted = {name: names.theirs(name) for name in shapes}
    head = names.theirs(_HEAD) if config.tie_embeddings else None
    buffers = {name: names.theirs(name) for name, _ in lm.named_buffers()}
    counters = {theirs for name, theirs in buffers.items() if name not in shapes}
    found = {name: part for name, part in found.items() if name not in counters}
    _compare({wanted[name]: shape for name, shape in shapes.items()}, found, head, where)
    stored = {name: found[name] for name in [*wanted.values(), head] if name in found}
    kind = dtype if adapted is None else None
    kept = exact_names(lm) | buffers.keys()
    exact = {theirs: stored.pop(theirs) for name, theirs in wanted.items() if name in kept}
    state = read_tensors(stored, kind, device) | read_tensors(exact, None, device)
    if head in state:
        _same(state.pop(head), state[wanted[_EMBED]], head, where)
    ours = {name: names.received(name, state[theirs], config) for name, theirs in wanted.items()}
    if adapted is not None:
        merged = lora.folded(*lora.split(ours), adapted.scale)
        kinds = {name: dtype for name in merged if dtype and name not in kept}
        ours = {name: tensor.to(kinds.get(name, tensor.dtype)) for name, tensor in merged.items()}
    if config.tie_embeddings:
        ours[_HEAD] = ours[_EMBED]
    lm.load_state_dict(names.together(ours), assign=True)
    if config.tie_embeddings:
        lm.head.weight = lm.embed.weight
    _from_zero(lm, device)
    return lm.eval()


def _shapes(config: ModelConfig, names: Names, adapted: LoRA | None) -> dict[str, tuple[int, ...]]:
    """Of everything that is stored of a model, by its names."""
    whole = LM(config)
    if adapted is not None:
        lora.add(whole, adapted)
    shapes = {name: tuple(part.shape) for name, part in names.apart(whole.state_dict()).items()}
    if config.tie_embeddings:
        del shapes[_HEAD]
    return shapes


def _from_zero(lm: LM, device: torch.device | str | None) -> None:
    """Counters that belong to a run, and not to its model, begin anew."""
    for module in lm.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                zero = torch.zeros_like(buffer, device=device or "cpu")
                module.register_buffer(name, zero, persistent=False)


def _compare(
    wanted: dict[str, tuple[int, ...]], found: dict[str, Stored], head: str | None, where: str
) -> None:
    for name, shape in wanted.items():
        if name not in found:
            raise UserError(f"{where}: tensor {name} is missing")
        if found[name].shape != shape:
            file, has = found[name].file, list(found[name].shape)
            raise UserError(f"{file}: tensor {name} is {has}; the config asks for {list(shape)}")
        if not found[name].weight:
            raise UserError(f"{found[name].file}: {name} holds whole numbers and no weights")
    for name in sorted(found):
        if name not in wanted and name != head and not _REDUNDANT.fullmatch(name):
            raise UserError(f"{found[name].file}: tensor {name} is not part of this model")


def _same(head: Tensor, embed: Tensor, name: str, where: str) -> None:
    if not torch.equal(head, embed):
        raise UserError(
            f"{where}: tensor {name} differs from the embedding, though config.json ties the two"
        )

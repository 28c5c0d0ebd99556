"""Which tensors of a model are trained: the one home of freezing.

A model's config names them (`trained`), so a frozen skeleton is remembered wherever the config is:
in recipes, checkpoints and folders. A pattern names a tensor (`blocks.0.feed_norm.weight`) or all
of a module (`blocks.*.feed`); `*` stands for any letters, dots too. Adapters (`nn.lora`) freeze
everything else, and `dyn_lora` may freeze its base. A frozen tensor has no gradient and no
optimizer state.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from tinsmith.core.errors import UserError
from tinsmith.core.parse import nearest

EVERYTHING = ("*",)


class Counts(NamedTuple):
    """Numbers in tensors, shared ones once."""

    trained: int
    frozen: int

    def __str__(self) -> str:
        return f"{self.trained:,} trained, {self.frozen:,} frozen"


def train_only(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze what no pattern names; what a part has frozen itself stays so. UserError for a pattern
    that names nothing.
    """
    names = {name: _with_owners(name) for name, _ in model.named_parameters()}
    known = {part for parts in names.values() for part in parts}
    for pattern in patterns:
        if not any(fnmatchcase(part, pattern) for part in known):
            hint = nearest(pattern, sorted(known))
            raise UserError(f"model.trained: '{pattern}' names no tensor of this model{hint}")
    for name, parameter in model.named_parameters():
        if not any(fnmatchcase(part, each) for part in names[name] for each in patterns):
            parameter.requires_grad_(False)


def counts(model: nn.Module) -> Counts:
    """How much of `model` is trained, and how much is not."""
    found = {True: 0, False: 0}
    for parameter in model.parameters():
        found[parameter.requires_grad] += parameter.numel()
    return Counts(found[True], found[False])


def _with_owners(name: str) -> list[str]:
    """`a.b.weight` -> a, a.b, a.b.weight."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]

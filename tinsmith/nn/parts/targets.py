"""Which weights of a model are meant by names and patterns.

A target is the last name or names of a linear layer (`q_proj`, `mixer.q_proj`) or of a stack of
experts (E, rows, columns), or a pattern over the whole name (`blocks.[0-3].mixer.*`); `all` is
every linear layer. The head is none of them: it is read whole, and may be the embedding.
"""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from tinsmith.core.errors import UserError
from tinsmith.core.parse import nearest
from tinsmith.nn.parts.init import Head


class Candidate(NamedTuple):
    """A weight that could be meant."""

    name: str
    """What targets are compared with: of a linear layer, or of a stack itself."""
    module: nn.Module
    parameter: str
    """Its name in the module."""

    def meant(self, target: str) -> bool:
        """Whether `target` names it."""
        if target == "all":
            return isinstance(self.module, nn.Linear)
        return _matches(self.name, target)


def chosen(model: nn.Module, targets: Sequence[str]) -> list[Candidate]:
    """Everything that some target names; UserError where one names nothing."""
    known = list(candidates(model))
    for target in targets:
        if not any(candidate.meant(target) for candidate in known):
            raise UserError(_unknown(model, target, known))
    return [each for each in known if any(each.meant(target) for target in targets)]


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """All that a target could name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if not isinstance(module, Head):
                yield Candidate(name, module, "weight")
        else:
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    yield Candidate(f"{name}.{key}".removeprefix("."), module, key)


def _matches(name: str, target: str) -> bool:
    return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")


def _unknown(model: nn.Module, target: str, candidates: list[Candidate]) -> str:
    short = [re.sub(r"^blocks\.\d+\.", "", candidate.name) for candidate in candidates]
    known = list(dict.fromkeys(short))
    there = f"there are {', '.join(known)}"
    if any(_matches(name, target) for name, _ in model.named_modules() if name):
        return f"lora.targets: '{target}' is not a linear layer that can be adapted; {there}"
    hint = nearest(target, [*known, *(name.rpartition(".")[2] for name in known)])
    return f"lora.targets: '{target}' names no linear layer of this model; {there}{hint}"

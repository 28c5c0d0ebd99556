"""Match parameters by name: LoRA and quantisation targets (target modules), and freezing.

A target is the last part of the name of a linear layer (`q_proj`, `mixer.q_proj`) or of a stack of
experts (E, rows, columns), or a pattern over the whole name (`blocks.[0-3].mixer.*`). `all` means
every linear layer; stacks are named. The output head is excluded, because it may be the tied
embedding.

`ModelConfig.trainable` lists the parameters that are trained, and the others are frozen. It is part
of the config, so recipes, checkpoints and exported folders keep it. A pattern names a tensor
(`blocks.0.feed_norm.weight`) or all tensors of a module (`blocks.*.feed`); `*` matches any
characters, dots included. Adapters (`nn.lora`) freeze everything else, and `dyn_lora` may freeze
its base. A frozen tensor has no gradient and no optimizer state.
"""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from tinsmith.core.errors import UserError
from tinsmith.core.parse import did_you_mean
from tinsmith.nn.layers.linear import LMHead


class TargetWeight(NamedTuple):
    """A weight that a target can match."""

    name: str
    """The name that targets are compared with: of a linear layer, or of a stack itself."""
    module: nn.Module
    param_name: str
    """Name of the parameter in the module."""

    @property
    def full_name(self) -> str:
        """The name of the parameter in the model."""
        return f"{self.name}.weight" if isinstance(self.module, nn.Linear) else self.name

    def matches(self, target: str) -> bool:
        """Whether `target` matches the weight."""
        if target == "all":
            return isinstance(self.module, nn.Linear)
        return _matches(self.name, target)


def match_targets(model: nn.Module, targets: Sequence[str]) -> list[TargetWeight]:
    """Return all weights that some target matches; UserError if a target matches none."""
    known = list(target_weights(model))
    for target in targets:
        if not any(candidate.matches(target) for candidate in known):
            raise UserError(_unknown(model, target, known))
    return [weight for weight in known if any(weight.matches(target) for target in targets)]


def target_weights(model: nn.Module) -> Iterator[TargetWeight]:
    """Yield the weights of linear layers and the stacks of experts, in model order."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if not isinstance(module, LMHead):
                yield TargetWeight(name, module, "weight")
        else:
            for key, _ in module.named_parameters(recurse=False):
                if key in getattr(module, "EXPERT_STACKS", ()):
                    yield TargetWeight(f"{name}.{key}".removeprefix("."), module, key)


def _matches(name: str, target: str) -> bool:
    return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")


def _unknown(model: nn.Module, target: str, candidates: list[TargetWeight]) -> str:
    short = [re.sub(r"^blocks\.\d+\.", "", candidate.name) for candidate in candidates]
    known = list(dict.fromkeys(short))
    available = f"there are {', '.join(known)}"
    if any(_matches(name, target) for name, _ in model.named_modules() if name):
        return f"lora.targets: '{target}' is not a linear layer that can be adapted; {available}"
    hint = did_you_mean(target, [*known, *(name.rpartition(".")[2] for name in known)])
    return f"lora.targets: '{target}' names no linear layer of this model; {available}{hint}"


ALL_PARAMETERS = ("*",)


class TrainableCounts(NamedTuple):
    """Counts of trainable and frozen parameters; a shared tensor counts once."""

    trainable: int
    frozen: int

    def __str__(self) -> str:
        return f"{self.trainable:,} trained, {self.frozen:,} frozen"


def freeze_except(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze all parameters that no pattern matches; parameters that are frozen already stay
    frozen.

    UserError for a pattern that matches nothing.
    """
    names = {name: _with_owners(name) for name, _ in model.named_parameters()}
    known = {part for parts in names.values() for part in parts}
    for pattern in patterns:
        if not any(fnmatchcase(part, pattern) for part in known):
            hint = did_you_mean(pattern, sorted(known))
            raise UserError(f"model.trainable: '{pattern}' names no tensor of this model{hint}")
    for name, parameter in model.named_parameters():
        if not any(fnmatchcase(part, pattern) for part in names[name] for pattern in patterns):
            parameter.requires_grad_(False)


def count_parameters(model: nn.Module) -> TrainableCounts:
    """Count the trainable and the frozen parameters of `model`."""
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return TrainableCounts(counts[True], counts[False])


def _with_owners(name: str) -> list[str]:
    """`a.b.weight` -> a, a.b, a.b.weight."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]

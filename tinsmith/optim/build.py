"""One object over all optimizers of a run: Muon or AdamW for matrices, AdamW for the rest."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tinsmith.core.errors import UserError
from tinsmith.optim.config import AdamWConfig, MuonConfig, OptimConfig
from tinsmith.optim.groups import ROLES, Partition, Role, partition
from tinsmith.optim.muon import Muon, blank_momentum
from tinsmith.optim.sharding import local, part, whole

EXTRA = "objective."
"""Stands before the names of the objective's own parameters."""

MUON_STATE = ("momentum",)
ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")


class Optimizers:
    """Every trainable parameter in one group, one group per role; frozen ones have no moments."""

    def __init__(self, groups: Partition, config: OptimConfig):
        """`groups`: role -> [(name, parameter)]; names are those of the saved state."""
        self.names = {parameter: name for role in ROLES for name, parameter in groups[role]}
        made = [
            _make(["matrix"], groups, config.matrices),
            _make([role for role in ROLES if role != "matrix"], groups, config.others),
        ]
        self.optimizers = [optimizer for optimizer in made if optimizer is not None]
        self.owners = {
            p: o for o in self.optimizers for group in o.param_groups for p in group["params"]
        }

    @classmethod
    def build(cls, module: nn.Module, extra: nn.Module | None, config: OptimConfig) -> "Optimizers":
        """Over all trainable parameters of the policy `module` and of `extra`, the objective's own,
        which are named `objective.NAME`.

        Call it when the parameters have their final device, dtype and spread over ranks.
        """
        groups = partition(module)
        if extra is not None:
            for role, named in partition(extra).items():
                groups[role] += [(EXTRA + name, parameter) for name, parameter in named]
        parameters = [parameter for named in groups.values() for _, parameter in named]
        assert len(set(parameters)) == len(parameters), (
            "the objective's own parameters include the policy's"
        )
        return cls(groups, config)

    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def set_multiplier(self, multiplier: float) -> None:
        """The learning rate of every group becomes its configured one times `multiplier`."""
        for group in self._param_groups():
            group["lr"] = group["initial_lr"] * multiplier

    def learning_rates(self) -> dict[Role, float]:
        """Role -> the rate of its next step."""
        return {group["role"]: group["lr"] for group in self._param_groups()}

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that is trained."""
        return iter(self.names)

    @torch.no_grad()
    def forget(self, resets: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Zero what is remembered of (parameter, rows): indices (N,) of its first dimension."""
        for parameter, rows in resets:
            for state in self._state(parameter).values():
                if state.dim():
                    mask = _row_mask(parameter, rows.to(state.device))
                    local(state).masked_fill_(part(mask, state), 0)

    def state_tensors(self) -> dict[str, Tensor]:
        """`NAME|momentum`, or `NAME|exp_avg`, `NAME|exp_avg_sq`, `NAME|step` -> the full tensor, on
        the CPU.

        Nothing before the first step; after it, zeros for a parameter that never had a gradient.
        Gathers where parameters are spread, so every rank must call it. A tensor that is whole and
        on the CPU already is the live one: write or copy it before the next step.
        """
        if not any(optimizer.state for optimizer in self.optimizers):
            return {}
        return {
            f"{name}|{key}": whole(tensor).detach().cpu()
            for parameter, name in self.names.items()
            for key, tensor in (
                self._state(parameter) or _blank(parameter, self.owners[parameter])
            ).items()
        }

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state_tensors`; every rank gives the same full tensors.

        Rates, betas and decays are the configuration's. Raises UserError, and changes nothing,
        where a tensor is missing, unexpected, or of another shape.
        """
        if tensors:
            self._check(tensors)
        for optimizer in self.optimizers:
            optimizer.state.clear()
        if not tensors:
            return
        for parameter, name in self.names.items():
            state = _blank(parameter, self.owners[parameter])
            for key, blank in state.items():
                local(blank).copy_(part(tensors[f"{name}|{key}"].to(blank.device), blank))
            self.owners[parameter].state[parameter] = state

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        cause = "it was saved by another model or another `optim` section"
        expected = {
            f"{name}|{key}": () if key == "step" else tuple(parameter.shape)
            for parameter, name in self.names.items()
            for key in (MUON_STATE if isinstance(self.owners[parameter], Muon) else ADAMW_STATE)
        }
        for name in [*expected, *tensors]:
            if name not in tensors:
                problem = "is missing"
            elif name not in expected:
                problem = "belongs to no trained parameter"
            elif (shape := tuple(tensors[name].shape)) != expected[name]:
                problem = f"has the shape {shape}, not {expected[name]}"
            else:
                continue
            raise UserError(f"optimizer state: '{name}' {problem}; {cause}")

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return self.owners[parameter].state.get(parameter, {}) if parameter in self.owners else {}

    def _param_groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self.optimizers:
            yield from optimizer.param_groups


def _make(
    roles: list[Role], groups: Partition, config: MuonConfig | AdamWConfig
) -> torch.optim.Optimizer | None:
    options = [
        {
            "params": [parameter for _, parameter in groups[role]],
            "role": role,
            "initial_lr": config.lr,
            "weight_decay": config.weight_decay if _decays(role, config) else 0.0,
        }
        for role in roles
        if groups[role]
    ]
    if not options:
        return None
    if isinstance(config, MuonConfig):
        return Muon(
            options,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            steps=config.ns_steps,
            scale=config.scale,
        )
    parameters = [parameter for group in options for parameter in group["params"]]
    return torch.optim.AdamW(
        options, lr=config.lr, betas=config.betas, eps=config.eps, fused=_fusible(parameters)
    )


def _decays(role: Role, config: MuonConfig | AdamWConfig) -> bool:
    if isinstance(config, AdamWConfig) and config.decay == "all":
        return role != "vector"
    return role == "matrix"


def _fusible(parameters: list[nn.Parameter]) -> bool:
    """Whether torch's fused AdamW runs there: one pass over memory, equal from run to run."""
    return all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)


def _blank(parameter: nn.Parameter, owner: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state from which `owner` makes the same first step as from none."""
    if isinstance(owner, Muon):
        return {"momentum": blank_momentum(parameter)}
    step = torch.zeros(
        (), device=parameter.device if _fusible([parameter]) else "cpu", dtype=torch.float32
    )
    return {
        "step": step,
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _row_mask(parameter: nn.Parameter, rows: Tensor) -> Tensor:
    mask = torch.zeros(parameter.shape[0], dtype=torch.bool, device=rows.device)
    mask[rows] = True
    return mask.view(-1, *[1] * (parameter.dim() - 1)).expand(parameter.shape).contiguous()

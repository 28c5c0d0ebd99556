"""One object over all optimizers of a run: one of several for matrices, AdamW for the rest."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tinsmith.core.errors import UserError
from tinsmith.distributed.dtensor import full_tensor, local_tensor, shard_like
from tinsmith.optim.config import AdamWConfig, MatrixConfig, OptimConfig
from tinsmith.optim.groups import ROLES, Partition, Role, partition
from tinsmith.optim.state_io import StateIO, make_optimizer

OBJECTIVE_PARAM_PREFIX = "objective."
"""Stands before the names of the objective's own parameters."""


class Optimizers:
    """Every trainable parameter in one group, one group per role; frozen ones have no moments."""

    def __init__(self, groups: Partition, config: OptimConfig):
        """`groups`: role -> [(name, parameter)]; names are those of the saved state."""
        self.param_names = {parameter: name for role in ROLES for name, parameter in groups[role]}
        found = [
            _make(["matrix"], groups, config.matrices),
            _make([role for role in ROLES if role != "matrix"], groups, config.others),
        ]
        memories = [memory for memory in found if memory is not None]
        self.optimizers = [memory.optimizer for memory in memories]
        self.state_ios = {
            parameter: memory
            for memory in memories
            for group in memory.optimizer.param_groups
            for parameter in group["params"]
        }

    @classmethod
    def build(
        cls, module: nn.Module, objective_module: nn.Module | None, config: OptimConfig
    ) -> "Optimizers":
        """Over all trainable parameters of the policy `module` and of `extra`, the objective's own,
        which are named `objective.NAME`.

        Call it when the parameters have their final device, dtype and spread over ranks.
        """
        groups = partition(module)
        if objective_module is not None:
            for role, named in partition(objective_module).items():
                groups[role] += [
                    (OBJECTIVE_PARAM_PREFIX + name, parameter) for name, parameter in named
                ]
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

    def set_lr_multiplier(self, multiplier: float) -> None:
        """The learning rate of every group becomes its configured one times `multiplier`."""
        for group in self._param_groups():
            group["lr"] = group["initial_lr"] * multiplier

    def learning_rates(self) -> dict[Role, float]:
        """Role -> the rate of its next step."""
        return {group["role"]: group["lr"] for group in self._param_groups()}

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that is trained."""
        return iter(self.param_names)

    @torch.no_grad()
    def reset_state(self, resets: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Zero what is remembered of (parameter, rows): indices (N,) of its first dimension."""
        for parameter, rows in resets:
            memory = self.state_ios.get(parameter)
            for state, nothing in memory.row_tensors(parameter) if memory else ():
                mask = _row_mask(state, rows.to(state.device))
                local_tensor(state).masked_fill_(shard_like(mask, state), nothing)

    def state_tensors(self) -> dict[str, Tensor]:
        """`NAME|momentum`, or what else `optim.state_io` lists -> the full tensor, on the CPU.

        Nothing before the first step; after it, zeros for a parameter that never had a gradient.
        Gathers where parameters are spread, so every rank must call it. A tensor that is whole and
        on the CPU already is the live one: write or copy it before the next step.
        """
        if not any(optimizer.state for optimizer in self.optimizers):
            return {}
        return {
            f"{name}|{key}": full_tensor(tensor).detach().cpu()
            for parameter, name in self.param_names.items()
            for key, tensor in self._saved(parameter).items()
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
        for parameter, name in self.param_names.items():
            state = self.state_ios[parameter].initial_state(parameter)
            for key, blank in state.items():
                local_tensor(blank).copy_(
                    shard_like(tensors[f"{name}|{key}"].to(blank.device), blank)
                )
            self.state_ios[parameter].load_state(parameter, state)

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        cause = "it was saved by another model or another `optim` section"
        expected = {
            f"{name}|{key}": tuple(blank.shape)
            for parameter, name in self.param_names.items()
            for key, blank in self.state_ios[parameter].initial_state(parameter).items()
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

    def _saved(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        memory = self.state_ios[parameter]
        return memory.state_tensors(parameter) or memory.initial_state(parameter)

    def _param_groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self.optimizers:
            yield from optimizer.param_groups


def _make(roles: list[Role], groups: Partition, config: MatrixConfig) -> StateIO | None:
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
    return make_optimizer(options, config) if options else None


def _decays(role: Role, config: MatrixConfig) -> bool:
    if isinstance(config, AdamWConfig) and config.decay == "all":
        return role != "vector"
    return role == "matrix"


def _row_mask(state: Tensor, rows: Tensor) -> Tensor:
    mask = torch.zeros(state.shape[0], dtype=torch.bool, device=rows.device)
    mask[rows] = True
    return mask.view(-1, *[1] * (state.dim() - 1)).expand(state.shape).contiguous()

"""Build the optimizers of a run: one for matrices, AdamW for all other parameters."""

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
"""Prefix of the names of the objective's own parameters."""


class Optimizers:
    """All optimizers of a run: each trainable parameter in one group, one group for each role."""

    def __init__(self, groups: Partition, config: OptimConfig):
        """`groups` maps roles to [(name, parameter)]; names are those in the saved state."""
        self.param_names = {parameter: name for role in ROLES for name, parameter in groups[role]}
        candidates = [
            _make_state_io(["matrix"], groups, config.matrices),
            _make_state_io([role for role in ROLES if role != "matrix"], groups, config.others),
        ]
        state_ios = [state_io for state_io in candidates if state_io is not None]
        self.optimizers = [state_io.optimizer for state_io in state_ios]
        self.state_ios = {
            parameter: state_io
            for state_io in state_ios
            for group in state_io.optimizer.param_groups
            for parameter in group["params"]
        }

    @classmethod
    def build(
        cls, module: nn.Module, objective_module: nn.Module | None, config: OptimConfig
    ) -> "Optimizers":
        """Build the optimizers of the policy `module` and of the objective's own parameters.

        The latter are named `objective.NAME`. Call it when the parameters have their final device,
        dtype and sharding.
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
        """Update every parameter that has a gradient."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop the gradients of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def set_lr_multiplier(self, multiplier: float) -> None:
        """Set the learning rate of every group to its initial rate times `multiplier`."""
        for group in self._param_groups():
            group["lr"] = group["initial_lr"] * multiplier

    def learning_rates(self) -> dict[Role, float]:
        """Return the learning rate of the next step by role."""
        return {group["role"]: group["lr"] for group in self._param_groups()}

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over all trained parameters."""
        return iter(self.param_names)

    @torch.no_grad()
    def reset_state(self, resets: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Reset the state of (parameter, rows): indices (N,) of its first dimension."""
        for parameter, rows in resets:
            state_io = self.state_ios.get(parameter)
            for state, zero_value in state_io.row_tensors(parameter) if state_io else ():
                mask = _row_mask(state, rows.to(state.device))
                local_tensor(state).masked_fill_(shard_like(mask, state), zero_value)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the optimizer state as full tensors on the CPU, by names such as `NAME|momentum`.

        `optim.state_io` lists the keys. The state is empty before the first step; afterwards it has
        zeros for a parameter that never had a gradient. Sharded parameters are gathered, so every
        rank must call it. A full tensor on the CPU is not copied: write or copy it before the next
        step.
        """
        if not any(optimizer.state for optimizer in self.optimizers):
            return {}
        return {
            f"{name}|{key}": full_tensor(tensor).detach().cpu()
            for parameter, name in self.param_names.items()
            for key, tensor in self._state_of(parameter).items()
        }

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `state_tensors` returned; every rank gives the same full tensors.

        Learning rates, betas and weight decays are those of the config. Raises UserError, and
        changes nothing, if a tensor is missing, unexpected, or has another shape.
        """
        if tensors:
            self._check(tensors)
        for optimizer in self.optimizers:
            optimizer.state.clear()
        if not tensors:
            return
        for parameter, name in self.param_names.items():
            state = self.state_ios[parameter].initial_state(parameter)
            for key, target in state.items():
                local_tensor(target).copy_(
                    shard_like(tensors[f"{name}|{key}"].to(target.device), target)
                )
            self.state_ios[parameter].load_state(parameter, state)

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        cause = "it was saved by another model or another `optim` section"
        expected = {
            f"{name}|{key}": tuple(tensor.shape)
            for parameter, name in self.param_names.items()
            for key, tensor in self.state_ios[parameter].initial_state(parameter).items()
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

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state_io = self.state_ios[parameter]
        return state_io.state_tensors(parameter) or state_io.initial_state(parameter)

    def _param_groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self.optimizers:
            yield from optimizer.param_groups


def _make_state_io(roles: list[Role], groups: Partition, config: MatrixConfig) -> StateIO | None:
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

"""Save and load optimizer state as tensors, the only module that depends on optimizer internals.

| kind | state of a weight of n elements |
|---|---|
| muon | `momentum`, n |
| adamw | `exp_avg`, `exp_avg_sq`, n each |
| adamw8bit | `state1`, `state2`, n bytes each, and `absmax1`, `absmax2`, one for each 256 of them |
| adafactor | `row_var`, `col_var`: the sums of its rows and columns; `variance`, n, of a vector |
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from tinsmith.core.errors import UserError
from tinsmith.optim.config import AdafactorConfig, AdamW8bitConfig, AdamWConfig, MuonConfig
from tinsmith.optim.muon import Muon, initial_momentum

State = dict[str, Any]
ParamGroups = list[dict[str, Any]]


class StateIO:
    """An optimizer and access to its state; here all of the state is tensors."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return a state that gives the same first step as an empty one."""
        raise NotImplementedError

    def state_tensors(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the state of a parameter without copying; empty before its first step."""
        return self.optimizer.state.get(parameter, {})

    def load_state(self, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        """Set the state of a parameter from `state_tensors`."""
        self.optimizer.state[parameter] = tensors

    def row_tensors(self, parameter: nn.Parameter) -> list[tuple[Tensor, int]]:
        """Return (state tensor, zero value) of all states that have a row for each row of the
        parameter.
        """
        states = self.state_tensors(parameter).values()
        return [(s, 0) for s in states if s.dim() and s.shape[0] == parameter.shape[0]]


class MuonStateIO(StateIO):
    """State of the optimizer `Muon`."""

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return state tensors of zeros."""
        return {"momentum": initial_momentum(parameter)}


class AdamWStateIO(StateIO):
    """State of torch's AdamW."""

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return state tensors of zeros."""
        device = parameter.device if supports_fused_adamw([parameter]) else "cpu"
        step = torch.zeros((), device=device, dtype=torch.float32)
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": step, **moments}


class AdafactorStateIO(StateIO):
    """State of torch's Adafactor."""

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return state tensors of zeros."""
        step, shape = torch.zeros((), dtype=torch.float32), parameter.shape
        if parameter.dim() < 2:
            return {"step": step, "variance": torch.zeros_like(parameter)}
        rows = parameter.new_zeros((*shape[:-1], 1))
        return {
            "step": step,
            "row_var": rows,
            "col_var": parameter.new_zeros((*shape[:-2], 1, shape[-1])),
        }


class AdamW8bitStateIO(StateIO):
    """State of bitsandbytes' AdamW8bit, which has an int step and code tables in its state."""

    STATE_KEYS = ("state1", "state2", "absmax1", "absmax2")
    MIN_8BIT_SIZE = 4096
    """Weights with fewer elements have float32 moments."""
    BLOCK_SIZE = 256

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return codes of 0 and scales of 0."""
        is_small, device = parameter.numel() < self.MIN_8BIT_SIZE, parameter.device
        dtype = torch.float32 if is_small else torch.uint8
        state = {key: torch.zeros_like(parameter, dtype=dtype) for key in self.STATE_KEYS[:2]}
        num_blocks = 0 if is_small else math.ceil(parameter.numel() / self.BLOCK_SIZE)
        scales = {
            key: torch.zeros(num_blocks, device=device) for key in self.STATE_KEYS[2:] if num_blocks
        }
        return {"step": torch.zeros(())} | state | scales

    def state_tensors(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the state without its code tables, which are constant."""
        state = self.optimizer.state.get(parameter, {})
        if not state:
            return {}
        step = torch.tensor(float(state["step"]))
        return {"step": step} | {key: state[key] for key in self.STATE_KEYS if key in state}

    def load_state(self, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        """Set the state and create the code tables."""
        group_index, param_index = self._indices(parameter)
        cast(Any, self.optimizer).init_state(
            self.optimizer.param_groups[group_index], parameter, group_index, param_index
        )
        state = self.optimizer.state[parameter]
        state |= tensors | {"step": int(tensors["step"])}

    def row_tensors(self, parameter: nn.Parameter) -> list[tuple[Tensor, int]]:
        """Return the codes, whose zero value is the code of 0."""
        state = self.optimizer.state.get(parameter, {})
        if "qmap1" not in state:
            return super().row_tensors(parameter)
        return [(state[f"state{n}"], int(state[f"qmap{n}"].abs().argmin())) for n in (1, 2)]

    def _indices(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Return the index of the parameter's group and its index in the group."""
        return next(
            (group_index, param_index)
            for group_index, group in enumerate(self.optimizer.param_groups)
            for param_index, other in enumerate(group["params"])
            if other is parameter
        )


def make_optimizer(
    param_groups: ParamGroups, config: MuonConfig | AdamWConfig | AdamW8bitConfig | AdafactorConfig
) -> StateIO:
    """Build the optimizer of `config` for parameter groups; UserError if it is not installed."""
    if isinstance(config, MuonConfig):
        return MuonStateIO(
            Muon(
                param_groups,
                lr=config.lr,
                momentum=config.momentum,
                nesterov=config.nesterov,
                ns_steps=config.ns_steps,
                scale=config.scale,
            )
        )
    if isinstance(config, AdafactorConfig):
        return AdafactorStateIO(
            torch.optim.Adafactor(
                param_groups, lr=config.lr, beta2_decay=config.beta2_decay, d=config.clip_update
            )
        )
    if isinstance(config, AdamW8bitConfig):
        adamw8bit = _import_adamw8bit()
        return AdamW8bitStateIO(
            adamw8bit(param_groups, lr=config.lr, betas=config.betas, eps=config.eps)
        )
    parameters = [parameter for group in param_groups for parameter in group["params"]]
    adamw = torch.optim.AdamW(
        param_groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=supports_fused_adamw(parameters),
    )
    return AdamWStateIO(adamw)


def _import_adamw8bit() -> Any:
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError:
        raise UserError(
            "optim: kind adamw8bit needs bitsandbytes, which is not installed here (pip install "
            "'tinsmith[bits]'); adafactor needs no package and less memory"
        ) from None
    return AdamW8bit


def supports_fused_adamw(parameters: list[nn.Parameter]) -> bool:
    """Whether torch's fused AdamW runs on these devices: one pass over memory, deterministic."""
    return all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)

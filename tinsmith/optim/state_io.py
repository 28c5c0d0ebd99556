"""What each optimizer remembers of a parameter, as tensors that are saved: the one place that knows
the insides of optimizers.

| kind | of a weight of n numbers |
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
    """An optimizer, and how its state is saved. Here: as it is, all of it tensors."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state from which the optimizer makes the same first step as from none."""
        raise NotImplementedError

    def state_tensors(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state of a parameter, live; nothing before its first step."""
        return self.optimizer.state.get(parameter, {})

    def load_state(self, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        """Make what `tensors` once gave the state."""
        self.optimizer.state[parameter] = tensors

    def row_tensors(self, parameter: nn.Parameter) -> list[tuple[Tensor, int]]:
        """The tensors that speak of single rows of the parameter, and what stands for nothing."""
        states = self.state_tensors(parameter).values()
        return [(s, 0) for s in states if s.dim() and s.shape[0] == parameter.shape[0]]


class MuonStateIO(StateIO):
    """State of the optimizer `Muon`."""

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return state tensors of zeros."""
        return {"momentum": initial_momentum(parameter)}


class AdamWStateIO(StateIO):
    """Of torch's AdamW."""

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return state tensors of zeros."""
        place = parameter.device if supports_fused_adamw([parameter]) else "cpu"
        step = torch.zeros((), device=place, dtype=torch.float32)
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": step, **moments}


class AdafactorStateIO(StateIO):
    """Of torch's Adafactor."""

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
    """Of bitsandbytes' AdamW8bit, which counts steps in an int and has its tables in its state."""

    STATE_KEYS = ("state1", "state2", "absmax1", "absmax2")
    MIN_8BIT_SIZE = 4096
    """Weights of fewer numbers keep their moments in float32."""
    BLOCK_SIZE = 256

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Codes of blocks whose largest number is 0."""
        small, place = parameter.numel() < self.MIN_8BIT_SIZE, parameter.device
        kind = torch.float32 if small else torch.uint8
        state = {key: torch.zeros_like(parameter, dtype=kind) for key in self.STATE_KEYS[:2]}
        blocks = 0 if small else math.ceil(parameter.numel() / self.BLOCK_SIZE)
        scales = {key: torch.zeros(blocks, device=place) for key in self.STATE_KEYS[2:] if blocks}
        return {"step": torch.zeros(())} | state | scales

    def state_tensors(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Without its tables, which are always the same."""
        state = self.optimizer.state.get(parameter, {})
        if not state:
            return {}
        step = torch.tensor(float(state["step"]))
        return {"step": step} | {key: state[key] for key in self.STATE_KEYS if key in state}

    def load_state(self, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        """With its tables."""
        group, place = self._place(parameter)
        cast(Any, self.optimizer).init_state(
            self.optimizer.param_groups[group], parameter, group, place
        )
        state = self.optimizer.state[parameter]
        state |= tensors | {"step": int(tensors["step"])}

    def row_tensors(self, parameter: nn.Parameter) -> list[tuple[Tensor, int]]:
        """Codes of 0."""
        state = self.optimizer.state.get(parameter, {})
        if "qmap1" not in state:
            return super().row_tensors(parameter)
        return [(state[f"state{n}"], int(state[f"qmap{n}"].abs().argmin())) for n in (1, 2)]

    def _place(self, parameter: nn.Parameter) -> tuple[int, int]:
        """The numbers of its group and of itself there."""
        return next(
            (number, place)
            for number, group in enumerate(self.optimizer.param_groups)
            for place, other in enumerate(group["params"])
            if other is parameter
        )


def make_optimizer(
    param_groups: ParamGroups, config: MuonConfig | AdamWConfig | AdamW8bitConfig | AdafactorConfig
) -> StateIO:
    """The optimizer that `config` names, over groups of parameters; UserError where it is not
    installed.
    """
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
        kind = _eight_bit()
        return AdamW8bitStateIO(
            kind(param_groups, lr=config.lr, betas=config.betas, eps=config.eps)
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


def _eight_bit() -> Any:
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError:
        raise UserError(
            "optim: kind adamw8bit needs bitsandbytes, which is not installed here (pip install "
            "'tinsmith[bits]'); adafactor needs nothing and remembers less"
        ) from None
    return AdamW8bit


def supports_fused_adamw(parameters: list[nn.Parameter]) -> bool:
    """Whether torch's fused AdamW runs there: one pass over memory, equal from run to run."""
    return all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)

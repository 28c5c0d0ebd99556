"""What parts share whose experts are chosen by a gate of thresholds.

Legend: B rows, T tokens, N = B T, E experts, P pairs, I inputs, O outputs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tinsmith.nn.contract import Ctx, Routed
from tinsmith.nn.routing.dispatch import Plan, combine, plan_of_mask
from tinsmith.nn.routing.threshold import Choice, Gate


class Gated(Routed):
    """A part whose experts are chosen by its `gate`."""

    gate: Gate

    def choose(self, x: Tensor, ctx: Ctx, learns: bool = True) -> Choice:
        """What the gate says of the tokens of x (B, T, D)."""
        valid_N = None if ctx.segments is None else ctx.segments.flatten() >= 0
        return self.gate(x.flatten(0, 1), valid_N, learns)

    def watched(self) -> dict[str, Tensor]:
        """The gate's thresholds."""
        return {"thresholds": self.gate.thresholds}

    @torch.no_grad()
    def chosen(self, x: Tensor, ctx: Ctx) -> Tensor:
        """(B, T, E) bool: which experts work on which tokens."""
        return self.choose(x, ctx).mask_NE.unflatten(0, x.shape[:2])


class Mixture(NamedTuple):
    """The pairs of a choice, and what each counts."""

    plan: Plan
    weights_P: Tensor

    @classmethod
    def of(cls, choice: Choice) -> "Mixture":
        """From what a gate said."""
        plan = plan_of_mask(choice.mask_NE)
        return cls(plan, plan.weights(choice.weight_NE))

    def __call__(self, x_BTI: Tensor, work: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(B, T, O): for each token the weighted sum over its experts. `work` (x_PI, ends_E) gives
        (P, O), what each pair's expert says.
        """
        x_NI = x_BTI.flatten(0, 1)
        y_PO = work(self.plan.gather(x_NI), self.plan.ends_E)
        return combine(y_PO, self.weights_P, self.plan, len(x_NI)).unflatten(0, x_BTI.shape[:2])

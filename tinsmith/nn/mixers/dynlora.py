"""Attention with a static base and gated low-rank changes to its projections (Tiny-ONN's DynSMLoRA,
which had a description and no code).

    z_t = W x_t + (alpha / rank) sum over the experts e of token t of  c_te B_e A_e x_t

for z the query, key and value (x is the mixer's input), before norms and rotation, and for the
output (x is then what the heads of token t saw). A (rank, inputs) begins at N(0, 1 / inputs), B
(outputs, rank) at 0, so the whole begins as its base. One gate of thresholds a layer
(`nn.routing.threshold`), on the mixer's input, chooses for all four. A token that wants nobody has
the base alone. With a base of 0 and full rank this is `dyn_heads`.

Legend: B rows, T tokens, N = B T, E experts, P pairs, R rank, D width, I inputs, O outputs.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinsmith.core.parse import Size
from tinsmith.nn.contract import Ctx, LayerCache, Mixer, MixerKind, Out, Reset, Site
from tinsmith.nn.mixers.gqa import GQA
from tinsmith.nn.parts.grouped import grouped
from tinsmith.nn.routing.gated import Gated, Mixture
from tinsmith.nn.routing.threshold import Gate, Threshold


@dataclass(frozen=True, kw_only=True)
class DynLoRA(Threshold, MixerKind):
    """A base gqa whose projections each token may change, by the experts it chooses."""

    kind: Literal["dyn_lora"] = "dyn_lora"
    base: GQA
    freeze_base: bool = False
    rank: Size = 8
    alpha: float = 8.0
    fallback: Literal["none"] = "none"
    router_grad: Literal["task"] = "task"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha} must be above 0")

    def check(self, dim: int) -> None:
        """As the base."""
        self.base.check(dim)

    def value_shape(self, dim: int) -> tuple[int, int] | None:
        """The base takes part in the value residual, or not."""
        return self.base.value_shape(dim)

    def build(self, site: Site) -> "DynLoRAMixer":
        """The module."""
        return DynLoRAMixer(self, site)


class LowRank(nn.Module):
    """A change B_e A_e to a linear layer for each of E experts."""

    def __init__(self, experts: int, layer: nn.Linear, rank: int):
        super().__init__()
        self.spread = 1 / math.sqrt(layer.in_features)
        self.down = nn.Parameter(torch.empty(experts, rank, layer.in_features))
        self.up = nn.Parameter(torch.zeros(experts, layer.out_features, rank))
        nn.init.normal_(self.down, std=self.spread)

    def forward(self, x_PI: Tensor, ends_E: Tensor) -> Tensor:
        """(P, O): what each pair's expert adds."""
        return grouped(grouped(x_PI, self.down, ends_E), self.up, ends_E)

    def flops(self) -> int:
        """Operations of one pair."""
        return 2 * (self.down[0].numel() + self.up[0].numel())


class DynLoRAMixer(Mixer, Gated):
    """The module of `DynLoRA`."""

    def __init__(self, config: DynLoRA, site: Site):
        super().__init__()
        self.active, self.scale = config.active, config.alpha / config.rank
        self.base = config.base.build(site)
        self.base.requires_grad_(not config.freeze_base)
        self.rotary_dim = self.base.rotary_dim
        self.gate = Gate(config, site.dim, site.layer)
        self.q_delta = LowRank(config.experts, self.base.q_proj, config.rank)
        self.k_delta = LowRank(config.experts, self.base.k_proj, config.rank)
        self.v_delta = LowRank(config.experts, self.base.v_proj, config.rank)
        self.o_delta = LowRank(config.experts, self.base.o_proj, config.rank)

    @property
    def deltas(self) -> tuple[LowRank, ...]:
        """All changes."""
        return self.q_delta, self.k_delta, self.v_delta, self.o_delta

    def forward(self, x: Tensor, ctx: Ctx, cache: Any = None) -> Out:
        """x (B, T, D) -> Out.y (B, T, D)."""
        choice = self.choose(x, ctx)
        mixture = Mixture.of(choice)

        def changed(x_BTI: Tensor, layer: nn.Linear, delta: LowRank) -> Tensor:
            return layer(x_BTI) + self.scale * mixture(x_BTI, delta)

        base = self.base
        q_BTI = changed(x, base.q_proj, self.q_delta)
        k_BTJ = changed(x, base.k_proj, self.k_delta)
        v_BTJ = changed(x, base.v_proj, self.v_delta)
        seen = base.look(q_BTI, k_BTJ, v_BTJ, ctx, cache)
        y_BTD = changed(seen.y, base.o_proj, self.o_delta)
        return Out(y_BTD, choice.losses, choice.stats, value=seen.value)

    def new_cache(
        self, rows: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """The base's, of changed keys and values."""
        return self.base.new_cache(rows, capacity, dtype, device)

    def post_step(self, stats: dict[str, Tensor]) -> list[Reset]:
        """Count, and let experts that never fire begin anew."""
        births = {delta.down: delta.spread for delta in self.deltas}
        return self.gate.post_step(stats, births | {delta.up: 0.0 for delta in self.deltas})

    def flops(self, context: int) -> int:
        """The base, the gate, and as many changes as a token is to have."""
        changes = self.active * sum(delta.flops() for delta in self.deltas)
        return int(self.base.flops(context) + self.gate.flops() + changes)

    def idle_parameters(self) -> int:
        """Those of the experts that a token does not have, if it has as many as SDL asks for."""
        held = sum(p.numel() for delta in self.deltas for p in delta.parameters())
        return round(held * (1 - self.active / self.gate.config.experts))

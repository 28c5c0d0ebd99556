"""Attention with a static base and routed low-rank updates of its projections (DynSMLoRA of
Tiny-ONN, which was described but not implemented).

    z_t = W x_t + (alpha / rank) sum over the experts e of token t of  c_te B_e A_e x_t

z is the query, key or value before norms and rotation, with x the mixer's input, or the output,
with x the concatenated heads. A (rank, inputs) is initialised from N(0, 1 / inputs) and B
(outputs, rank) with 0, so the initial function is that of the base. One router per layer
(`moe.cosine_router`), applied to the mixer's input, selects the experts for all four. A token
without experts uses the base alone. With W = 0 and full rank this equals `dyn_heads`.

Legend: B rows, T tokens, N = B T, E experts, P pairs, R rank, D width, I inputs, O outputs.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tinsmith.core.parse import Size
from tinsmith.nn.contract import (
    BuildContext,
    Ctx,
    LayerCache,
    Mixer,
    MixerConfigBase,
    OptimizerReset,
    Out,
)
from tinsmith.nn.mixers.gqa import GQA
from tinsmith.nn.moe.cosine_router import (
    CosineRouted,
    CosineRouter,
    CosineRouterConfig,
    ExpertMixture,
)
from tinsmith.nn.moe.grouped_gemm import grouped_linear


@dataclass(frozen=True, kw_only=True)
class DynLoRA(CosineRouterConfig, MixerConfigBase):
    """Grouped-query attention whose projections get low-rank updates from selected experts."""

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
        """Check the config of the base."""
        self.base.check(dim)

    def value_residual_shape(self, dim: int) -> tuple[int, int] | None:
        """Return the shape of the base's value residual, or None."""
        return self.base.value_residual_shape(dim)

    def build(self, build_ctx: BuildContext) -> "DynLoRAMixer":
        """Build the module."""
        return DynLoRAMixer(self, build_ctx)


class LowRankExperts(nn.Module):
    """A low-rank update B_e A_e of a linear layer for each of E experts."""

    EXPERT_STACKS: ClassVar[tuple[str, ...]] = ("down", "up")

    def __init__(self, experts: int, layer: nn.Linear, rank: int):
        super().__init__()
        self.init_std = 1 / math.sqrt(layer.in_features)
        self.down = nn.Parameter(torch.empty(experts, rank, layer.in_features))
        self.up = nn.Parameter(torch.zeros(experts, layer.out_features, rank))
        nn.init.normal_(self.down, std=self.init_std)

    def forward(self, x_PI: Tensor, ends_E: Tensor) -> Tensor:
        """Return the update of each pair's expert, (P, O)."""
        return grouped_linear(grouped_linear(x_PI, self.down, ends_E), self.up, ends_E)

    def flops(self) -> int:
        """Count the FLOPs of one pair."""
        return 2 * (self.down[0].numel() + self.up[0].numel())


class DynLoRAMixer(Mixer, CosineRouted):
    """The module of `DynLoRA`."""

    def __init__(self, config: DynLoRA, build_ctx: BuildContext):
        super().__init__()
        self.active, self.scale = config.target_experts_per_token, config.alpha / config.rank
        self.base = config.base.build(build_ctx)
        self.base.requires_grad_(not config.freeze_base)
        self.rotary_dim, self.window = self.base.rotary_dim, self.base.window
        self.gate = CosineRouter(config, build_ctx.dim, build_ctx.layer_idx)
        self.q_delta = LowRankExperts(config.experts, self.base.q_proj, config.rank)
        self.k_delta = LowRankExperts(config.experts, self.base.k_proj, config.rank)
        self.v_delta = LowRankExperts(config.experts, self.base.v_proj, config.rank)
        self.o_delta = LowRankExperts(config.experts, self.base.o_proj, config.rank)

    @property
    def deltas(self) -> tuple[LowRankExperts, ...]:
        """The low-rank experts of all four projections."""
        return self.q_delta, self.k_delta, self.v_delta, self.o_delta

    def forward(self, x: Tensor, ctx: Ctx, cache: Any = None) -> Out:
        """Map x (B, T, D) to Out.y (B, T, D)."""
        routing = self.route(x, ctx)
        mixture = ExpertMixture.from_router_output(routing)

        def project(x_BTI: Tensor, layer: nn.Linear, delta: LowRankExperts) -> Tensor:
            return layer(x_BTI) + self.scale * mixture(x_BTI, delta)

        base = self.base
        q_BTI = project(x, base.q_proj, self.q_delta)
        k_BTJ = project(x, base.k_proj, self.k_delta)
        v_BTJ = project(x, base.v_proj, self.v_delta)
        heads = base.attend(q_BTI, k_BTJ, v_BTJ, ctx, cache)
        y_BTD = project(heads.y, base.o_proj, self.o_delta)
        return Out(y_BTD, routing.losses, routing.stats, value_residual=heads.value_residual)

    def new_cache(
        self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """Create the cache of the base, for keys and values after the updates."""
        return self.base.new_cache(batch_size, capacity, dtype, device)

    def post_step(self, stats: dict[str, Tensor]) -> list[OptimizerReset]:
        """Count expert usage and re-initialise dead experts."""
        resets = {delta.down: delta.init_std for delta in self.deltas}
        return self.gate.post_step(stats, resets | {delta.up: 0.0 for delta in self.deltas})

    def flops(self, seq_len: int) -> int:
        """Count the base, the router, and updates by the target number of experts per token."""
        delta_flops = self.active * sum(delta.flops() for delta in self.deltas)
        return int(self.base.flops(seq_len) + self.gate.flops() + delta_flops)

    def inactive_parameters(self) -> int:
        """Count the parameters of unused experts, at the target number of experts per token."""
        total = sum(p.numel() for delta in self.deltas for p in delta.parameters())
        return round(total * (1 - self.active / self.gate.config.experts))

"""Attention whose projections are experts (Tiny-ONN's DynSMHA, in its merge mode).

    z_t = sum over the experts e of token t of  c_te W_e x_t        z one of q, k, v
    y_t = sum over e of  c_te O_e a_t                               a = attention(q, k, v)

One expert is a complete set of projections W_q, W_k, W_v and O. `moe.cosine_router` selects the
experts of each token and their weights c. Heads, norms, rotation, window and cache are those of
`gqa`: one expert equals `gqa`, and one head is Tiny-ONN's form. No matrix is built per token;
instead, pairs of token and expert are sorted by expert.

A token without experts (`fallback: none`) has query, key and value 0 and output 0, so it cannot use
earlier tokens. A re-initialised expert has output 0 initially, but its keys and queries take effect
from the first token that selects it.

Legend: B rows, T tokens, N = B T, E experts, P pairs, D width, I queries, J keys or values.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from tinsmith.core.parse import Size
from tinsmith.nn.contract import BuildContext, Ctx, MixerConfigBase, OptimizerReset, Out
from tinsmith.nn.layers.linear import ExpertOutWeight, ExpertWeight
from tinsmith.nn.mixers.gqa import GQA, AttentionMixer
from tinsmith.nn.moe.cosine_router import (
    CosineRouted,
    CosineRouter,
    CosineRouterConfig,
    ExpertMixture,
)
from tinsmith.nn.moe.dead_experts import expert_reset_stds
from tinsmith.nn.moe.grouped_gemm import grouped_linear


@dataclass(frozen=True, kw_only=True)
class DynHeads(CosineRouterConfig, MixerConfigBase):
    """Attention whose projections are experts selected by each token."""

    kind: Literal["dyn_heads"] = "dyn_heads"
    heads: Size = 4
    kv_heads: Size | None = None  # = heads
    head_dim: Size | None = None  # = dim // heads
    qk_norm: bool = False
    window: int | None = None
    rope: bool = True
    router_grad: Literal["task"] = "task"

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.gqa_config.heads == self.heads  # GQA validates the sizes

    @property
    def gqa_config(self) -> GQA:
        """The attention config of a single expert."""
        return GQA(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            qk_norm=self.qk_norm,
            window=self.window,
            rope=self.rope,
        )

    def check(self, dim: int) -> None:
        """Check the equivalent config of grouped-query attention."""
        self.gqa_config.check(dim)

    def build(self, build_ctx: BuildContext) -> "DynHeadsMixer":
        """Build the module."""
        return DynHeadsMixer(self, build_ctx)


class DynHeadsMixer(AttentionMixer, CosineRouted):
    """The module of `DynHeads`."""

    def __init__(self, config: DynHeads, build_ctx: BuildContext):
        super().__init__(config.gqa_config, build_ctx)
        self.active = config.target_experts_per_token
        queries, keys = self.proj_dims
        self.gate = CosineRouter(config, build_ctx.dim, build_ctx.layer_idx)
        self.q_proj = ExpertWeight(config.experts, build_ctx.dim, queries)
        self.k_proj = ExpertWeight(config.experts, build_ctx.dim, keys)
        self.v_proj = ExpertWeight(config.experts, build_ctx.dim, keys)
        self.o_proj = ExpertOutWeight(config.experts, queries, build_ctx.dim)

    def forward(self, x: Tensor, ctx: Ctx, cache: Any = None) -> Out:
        """Map x (B, T, D) to Out.y (B, T, D)."""
        routing = self.route(x, ctx)
        mixture = ExpertMixture.from_router_output(routing)

        def project(x_BTI: Tensor, stack: ExpertWeight) -> Tensor:
            return mixture(x_BTI, lambda x_PI, ends_E: grouped_linear(x_PI, stack.weight, ends_E))

        q_BTI, k_BTJ, v_BTJ = (
            project(x, stack) for stack in (self.q_proj, self.k_proj, self.v_proj)
        )
        heads_BTI = self.attend(q_BTI, k_BTJ, v_BTJ, ctx, cache).y
        return Out(project(heads_BTI, self.o_proj), routing.losses, routing.stats)

    def post_step(self, stats: dict[str, Tensor]) -> list[OptimizerReset]:
        """Count expert usage and re-initialise dead experts."""
        return self.gate.post_step(stats, expert_reset_stds(self))

    def flops(self, seq_len: int) -> int:
        """Count router, attention, and projections by the target number of experts per token."""
        return int(
            self.active * self.projection_flops()
            + self.gate.flops()
            + self.attention_flops(seq_len)
        )

    def inactive_parameters(self) -> int:
        """Count the parameters of unused experts, at the target number of experts per token."""
        total = sum(
            stack.weight.numel() for stack in (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        )
        return round(total * (1 - self.active / self.gate.config.experts))

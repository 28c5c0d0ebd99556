"""Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1).

    q_t = [W_UQ c^Q_t, rope(W_QR c^Q_t)]             c^Q_t = norm(W_DQ x_t)
    y_t = O softmax((q_t . k_s) / sqrt(N + R)) v_s   keys and values: `attention.latent`

A cache holds kv_rank + rope_dim numbers per token, for all heads together. Without a cache, keys
and values are expanded from the latents. With a cache, the cheaper form is used: absorbed queries
for few queries, expanded keys and values otherwise. With YaRN the attention factor applies to the
whole logit, not only to the rotated part (DeepSeek's `mscale_all_dim`).

Legend: B rows, T tokens, H heads, N unrotated part of a head, R rotated part, C latent, V values.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tinsmith.nn.attention.cache import KVCache
from tinsmith.nn.attention.core import attend
from tinsmith.nn.attention.latent import LatentHeads, linear_flops
from tinsmith.nn.attention.span import Span
from tinsmith.nn.contract import BuildContext, Ctx, LayerCache, Mixer, Out
from tinsmith.nn.layers.linear import ResidualProj


@dataclass(frozen=True, kw_only=True)
class MLA(LatentHeads):
    """Config of multi-head latent attention."""

    kind: Literal["mla"] = "mla"

    def build(self, build_ctx: BuildContext) -> "MLAMixer":
        """Build the module."""
        return MLAMixer(self, build_ctx)


class MLAMixer(Mixer):
    """The module of `MLA`."""

    def __init__(self, config: MLA, build_ctx: BuildContext):
        super().__init__()
        self.config, self.dim = config, build_ctx.dim
        self.rotary_dim = config.rope_dim if build_ctx.use_rope else None
        self.nope_factor = build_ctx.attention_scaling**2
        self.attention, self.dropout = build_ctx.attention, build_ctx.attention_dropout
        self.queries, self.keys = (
            config.build_queries(build_ctx.dim),
            config.build_keys(build_ctx.dim),
        )
        self.o_proj = ResidualProj(config.heads * config.v_dim, build_ctx.dim, bias=False)

    def forward(self, x: Tensor, ctx: Ctx, cache: Any = None) -> Out:
        """Map x (B, T, D) to Out.y (B, T, D)."""
        rotary = ctx.rotary[self.rotary_dim] if self.rotary_dim else None
        nope_BTHN, rope_BTHR, _ = self.queries(x, rotary)
        nope_BTHN = nope_BTHN * self.nope_factor
        latent_BSC, rope_BSR = self.keys(x, rotary)
        if cache is None:
            span, attention = (
                ctx.span(),
                self._expanded,
            )
        else:
            (latent_BSC, rope_BSR), span = cache.append(ctx.segments, latent_BSC, rope_BSR)
            latent_BSC, rope_BSR = latent_BSC.to(x.dtype), rope_BSR.to(x.dtype)
            attention = (
                self._absorbed if self.config.prefer_absorbed(x.shape[1]) else self._expanded
            )
        y_BTHV = attention(nope_BTHN, rope_BTHR, latent_BSC, rope_BSR, span)
        return Out(self.o_proj(y_BTHV.flatten(2)))

    def _expanded(
        self,
        nope_BTHN: Tensor,
        rope_BTHR: Tensor,
        latent_BSC: Tensor,
        rope_BSR: Tensor,
        span: Span,
    ) -> Tensor:
        k_BSHD, v_BSHV = self.keys.expand(latent_BSC, rope_BSR)
        return self._attend(torch.cat((nope_BTHN, rope_BTHR), -1), k_BSHD, v_BSHV, span)

    def _absorbed(
        self,
        nope_BTHN: Tensor,
        rope_BTHR: Tensor,
        latent_BSC: Tensor,
        rope_BSR: Tensor,
        span: Span,
    ) -> Tensor:
        q_BTHD = self.keys.absorb_queries(nope_BTHN, rope_BTHR)
        k_BS1D = torch.cat((latent_BSC, rope_BSR), -1)[:, :, None]
        return self.keys.project_values(self._attend(q_BTHD, k_BS1D, latent_BSC[:, :, None], span))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return attend(q, k, v, span, kind=self.attention, dropout=dropout)

    def new_cache(
        self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """Create a cache of normalised latents and rotated keys: kv_rank + rope_dim numbers per
        token.
        """
        shapes: list[tuple[int, ...]] = [(self.config.kv_rank,), (self.config.rope_dim,)]
        return KVCache(batch_size, capacity, shapes, dtype, device)

    def flops(self, seq_len: int) -> int:
        """Count projections, and scores and sums over the mean number of visible keys."""
        return linear_flops(self) + self.config.pair_flops * (seq_len + 1) // 2

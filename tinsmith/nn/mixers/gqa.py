"""Grouped-query attention (Ainslie et al., 2305.13245): H query heads share G key and value heads.

    y = O softmax(q k^T / sqrt(d)) v      q, k normalised with qk_norm (Qwen3), then rotated

Options: `window` (each token attends to the last `window` tokens, itself included: Mistral),
`sinks` (a learned logit per head in the softmax's denominator: gpt-oss), `value_residual` (v = l1
v_first + l2 v: Zhou et al., 2410.17897), biases (Qwen2 has them on q, k and v).

Legend: B rows, T tokens, H query heads, G key and value heads, D head width.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinsmith.core.parse import Size
from tinsmith.nn.attention.cache import KVCache, RotatingKVCache
from tinsmith.nn.attention.core import GroupedHeads, attend
from tinsmith.nn.attention.rope import apply_rotary_emb
from tinsmith.nn.contract import BuildContext, Ctx, LayerCache, Mixer, Out, TensorSplit
from tinsmith.nn.layers.linear import ResidualProj
from tinsmith.nn.layers.norm import RMSNorm


@dataclass(frozen=True, kw_only=True)
class GQA(GroupedHeads):
    """Grouped-query attention; with `window`, sliding-window attention."""

    kind: Literal["gqa"] = "gqa"
    heads: Size = 8
    kv_heads: Size | None = None  # = heads
    head_dim: Size | None = None  # = dim // heads
    qk_norm: bool = False
    window: int | None = None
    sinks: bool = False
    value_residual: bool = False
    bias: Literal["none", "qkv", "all"] = "none"
    rope: bool = True

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.heads % self.num_kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")

    def build(self, build_ctx: BuildContext) -> "GQAMixer":
        """Build the module."""
        return GQAMixer(self, build_ctx)


class AttentionMixer(Mixer):
    """Attention on projected queries, keys and values: norms, RoPE, value residual, KV cache."""

    def __init__(self, config: GQA, build_ctx: BuildContext):
        super().__init__()
        self.heads, self.num_kv_heads, self.head_dim = (
            config.heads,
            config.num_kv_heads,
            config.resolve_head_dim(build_ctx.dim),
        )
        self.window = config.window
        self.attention, self.dropout = build_ctx.attention, build_ctx.attention_dropout
        self.rotary_dim = self.head_dim if config.rope and build_ctx.use_rope else None
        self.dim = build_ctx.dim
        self.q_norm = (
            RMSNorm(self.head_dim, build_ctx.norm_eps) if config.qk_norm else nn.Identity()
        )
        self.k_norm = (
            RMSNorm(self.head_dim, build_ctx.norm_eps) if config.qk_norm else nn.Identity()
        )
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if config.sinks else None
        self.value_residual = config.value_residual
        mixes_values = config.value_residual and not build_ctx.is_value_residual_source
        self.value_mix = nn.Parameter(torch.full((2,), 0.5)) if mixes_values else None

    def attend(self, q_BTI: Tensor, k_BTJ: Tensor, v_BTJ: Tensor, ctx: Ctx, cache: Any) -> Out:
        """Return the attention output before the output projection, Out.y (B, T, I).

        I = heads head_dim, J = kv_heads head_dim.
        """
        batch_size, num_tokens, _ = q_BTI.shape
        q_BTHD = self.q_norm(q_BTI.view(batch_size, num_tokens, self.heads, self.head_dim))
        k_BTGD = self.k_norm(k_BTJ.view(batch_size, num_tokens, self.num_kv_heads, self.head_dim))
        v_BTGD = v_BTJ.view(batch_size, num_tokens, self.num_kv_heads, self.head_dim)
        if self.rotary_dim:
            rotary = ctx.rotary[self.rotary_dim]
            q_BTHD, k_BTGD = apply_rotary_emb(q_BTHD, rotary), apply_rotary_emb(k_BTGD, rotary)
        value_residual = v_BTGD if self.value_residual else None
        if self.value_mix is not None and ctx.value_residual is not None:
            v_BTGD = (self.value_mix[0] * ctx.value_residual + self.value_mix[1] * v_BTGD).to(
                v_BTGD.dtype
            )
        if cache is None:
            span = ctx.span(self.window)
        else:
            (k_BTGD, v_BTGD), span = cache.append(ctx.segments, k_BTGD, v_BTGD)
        dropout = self.dropout if self.training else 0.0
        y_BTHD = attend(
            q_BTHD, k_BTGD, v_BTGD, span, kind=self.attention, dropout=dropout, sinks_H=self.sinks
        )
        return Out(y_BTHD.flatten(2), value_residual=value_residual)

    def new_cache(
        self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """Create a cache of keys (after RoPE) and values (after the value residual).

        It holds 2 kv_heads head_dim numbers per token.
        """
        shapes: list[tuple[int, ...]] = [(self.num_kv_heads, self.head_dim)] * 2
        if self.window is not None:
            return RotatingKVCache(batch_size, capacity, self.window, shapes, dtype, device)
        return KVCache(batch_size, capacity, shapes, dtype, device)

    @property
    def proj_dims(self) -> tuple[int, int]:
        """The widths of all queries, and of all keys (or all values)."""
        return self.heads * self.head_dim, self.num_kv_heads * self.head_dim

    def projection_flops(self) -> int:
        """Count FLOPs per token of the query, key, value and output projections."""
        return 4 * self.dim * sum(self.proj_dims)

    def attention_flops(self, seq_len: int) -> float:
        """Count FLOPs per token of scores and sums over the mean number of visible keys."""
        window = min(self.window or seq_len, seq_len)
        return 4 * self.proj_dims[0] * (window - window * (window - 1) / (2 * seq_len))


class GQAMixer(AttentionMixer):
    """The module of `GQA`."""

    def __init__(self, config: GQA, build_ctx: BuildContext):
        super().__init__(config, build_ctx)
        qkv_bias, out_bias = config.bias != "none", config.bias == "all"
        queries, keys = self.proj_dims
        self.q_proj = nn.Linear(build_ctx.dim, queries, bias=qkv_bias)
        self.k_proj = nn.Linear(build_ctx.dim, keys, bias=qkv_bias)
        self.v_proj = nn.Linear(build_ctx.dim, keys, bias=qkv_bias)
        self.o_proj = ResidualProj(queries, build_ctx.dim, bias=out_bias)

    def forward(self, x: Tensor, ctx: Ctx, cache: Any = None) -> Out:
        """Map x (B, T, D) to Out.y (B, T, D)."""
        out = self.attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), ctx, cache)
        return out._replace(y=self.o_proj(out.y))

    def flops(self, seq_len: int) -> int:
        """Count projections and attention."""
        return int(self.projection_flops() + self.attention_flops(seq_len))

    def tensor_plan(self) -> dict[str, TensorSplit]:
        """Split heads: queries, keys and values by columns, the output projection by rows."""
        return {"q_proj": "column", "k_proj": "column", "v_proj": "column", "o_proj": "row"}

"""DeepSeek Sparse Attention (DeepSeek-V3.2, 2512.02556): latent attention to the `index_topk`
earlier tokens that a learned indexer scores highest.

    S_t = `index_topk` best of I_t,<=t      y_t = O softmax_s in S_t ((q_t . k_s) / sqrt(N + R)) v_s

All heads attend to the same tokens, so attention always uses absorbed queries (`attention.latent`)
and gathers latents. The indexer is trained by `losses["indexer"]`: `index_weight` times the mean
over tokens of KL(p || softmax I), where p is the layer's own attention to all earlier tokens
(`index_target: dense`) or to the selected ones (`selected`, the paper's second stage). The paper's
Hadamard rotation does not change the products and is omitted. A narrow index head (index_dim <
rope_dim) is rotated completely.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tinsmith.nn.attention.cache import KVCache
from tinsmith.nn.attention.indexer import IndexedHeads
from tinsmith.nn.attention.latent import linear_flops
from tinsmith.nn.attention.token_sparse import TokenSparseConfig, attend_topk_tokens
from tinsmith.nn.contract import BuildContext, Ctx, LayerCache, Mixer, Out
from tinsmith.nn.layers.linear import ResidualProj


@dataclass(frozen=True, kw_only=True)
class DSA(IndexedHeads):
    """Latent attention to the tokens that an indexer selects."""

    kind: Literal["dsa"] = "dsa"

    def build(self, build_ctx: BuildContext) -> "DSAMixer":
        """Build the module."""
        return DSAMixer(self, build_ctx)


class DSAMixer(Mixer):
    """The module of `DSA`."""

    def __init__(self, config: DSA, build_ctx: BuildContext):
        super().__init__()
        self.config, self.dim = config, build_ctx.dim
        self.rotary_dim = config.rope_dim if build_ctx.use_rope else None
        self.nope_factor = build_ctx.attention_scaling**2
        self.attention, self.dropout = build_ctx.attention, build_ctx.attention_dropout
        self.queries, self.keys = (
            config.build_queries(build_ctx.dim),
            config.build_keys(build_ctx.dim),
        )
        self.indexer = config.build_indexer(build_ctx.dim)
        self.o_proj = ResidualProj(config.heads * config.v_dim, build_ctx.dim, bias=False)

    def forward(self, x: Tensor, ctx: Ctx, cache: Any = None) -> Out:
        """Map x (B, T, D) to Out.y (B, T, D); in training, with losses["indexer"]."""
        rotary = ctx.rotary[self.rotary_dim] if self.rotary_dim else None
        nope_BTHN, rope_BTHR, source = self.queries(x, rotary)
        latent_BSC, rope_BSR = self.keys(x, rotary)
        index = self.indexer(x, source, rotary)
        if cache is None:
            span = ctx.span()
        else:
            cached, span = cache.append(ctx.segments, latent_BSC, rope_BSR, index.k_BSE)
            latent_BSC, rope_BSR, k_BSE = (tensor.to(x.dtype) for tensor in cached)
            index = index._replace(k_BSE=k_BSE)
        q_BTHD = self.keys.absorb_queries(nope_BTHN * self.nope_factor, rope_BTHR)
        k_BS1D = torch.cat((latent_BSC, rope_BSR), -1)[:, :, None]
        v_BS1C, config = latent_BSC[:, :, None], self._sparse_config()
        mixed_BTHC, index_loss = attend_topk_tokens(
            q_BTHD, k_BS1D, v_BS1C, index, span, ctx.segments, config
        )
        y = self.o_proj(self.keys.project_values(mixed_BTHC).flatten(2))
        return Out(
            y, {} if index_loss is None else {"indexer": self.config.index_weight * index_loss}
        )

    def _sparse_config(self) -> TokenSparseConfig:
        index_target = self.config.index_target if self.training else None
        dropout = self.dropout if self.training else 0.0
        return TokenSparseConfig(self.config.index_topk, index_target, self.attention, dropout)

    def new_cache(
        self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """Create a cache of latents, rotated keys and index keys.

        It holds kv_rank + rope_dim + index_dim numbers per token.
        """
        widths = (self.config.kv_rank, self.config.rope_dim, self.config.index_dim)
        return KVCache(batch_size, capacity, [(width,) for width in widths], dtype, device)

    def flops(self, seq_len: int) -> int:
        """Count projections, index scores of earlier tokens and attention to the selected ones."""
        config = self.config
        index_flops = config.index_heads * config.index_dim * (seq_len + 1)
        num_selected = min(config.index_topk, seq_len)
        mean_selected = num_selected - num_selected * (num_selected - 1) / (2 * seq_len)
        attention_flops = 2 * config.heads * (2 * config.kv_rank + config.rope_dim) * mean_selected
        absorbed_flops = 2 * config.heads * config.kv_rank * (config.nope_dim + config.v_dim)
        # LatentKeys.up multiplies queries and outputs instead of keys and values (`absorbed_flops`)
        expanded_flops = 2 * self.keys.up.weight.numel()
        return int(
            linear_flops(self) - expanded_flops + absorbed_flops + index_flops + attention_flops
        )

"""A recurrent mixer in a user's file, as `--contracts FILE` takes it. The suite always tests it.

Linear attention with decay and the normaliser of mLSTM (Beck et al., 2405.04517, without its
exponential gates):

    S_t = a_t S_{t-1} + k_t v_t'     z_t = a_t z_{t-1} + k_t     a_t = sigmoid(w_a . x_t), per head
    y_t = O (g_t * S_t' q_t / max(|z_t . q_t|, 1))               g_t = silu(W_g x_t)

The state of a row has a fixed size: S (H, K, V) and z (H, K). Legend: B rows, T tokens, H heads, K
width of a query or key, V width of a value.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.nn.contract import BuildContext, Ctx, Mixer, MixerConfigBase, Out
from tinsmith.nn.layers.linear import ResidualProj
from tinsmith.nn.precision import at_least_fp32
from tinsmith.nn.recurrent import RecurrentCache, recurrent_steps

DIM = 32
SAMPLES = {"recurrent": [{"heads": 4}, {"heads": 2, "key_dim": 3}]}
CACHE_SIZES = {
    "recurrent": lambda mixer, capacity: (
        mixer.heads * mixer.resolve_key_dim(DIM) * (DIM // mixer.heads + 1)
    )
}
NOT_TRUNCATABLE = {"recurrent"}


@dataclass(frozen=True, kw_only=True)
class LinearAttention(MixerConfigBase):
    kind: Literal["recurrent"] = "recurrent"
    heads: int = 4
    key_dim: int | None = None  # = dim // heads

    def resolve_key_dim(self, dim: int) -> int:
        return self.key_dim or dim // self.heads

    def build(self, build_ctx: BuildContext) -> "LinearAttentionMixer":
        return LinearAttentionMixer(self, build_ctx)


class LinearAttentionMixer(Mixer):
    def __init__(self, config: LinearAttention, build_ctx: BuildContext):
        super().__init__()
        dim, self.heads = build_ctx.dim, config.heads
        self.key_dim, self.value_dim = config.resolve_key_dim(dim), dim // config.heads
        self.dropout = build_ctx.attention_dropout
        keys = config.heads * self.key_dim
        self.q_proj, self.k_proj = (nn.Linear(dim, keys, bias=False) for _ in range(2))
        self.v_proj, self.g_proj = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.decay_proj = nn.Linear(dim, config.heads)
        self.o_proj = ResidualProj(dim, dim, bias=False)

    def forward(self, x: Tensor, ctx: Ctx, cache: Any = None) -> Out:
        q_BTHK, k_BTHK, v_BTHV = (
            layer(x).unflatten(-1, (self.heads, -1)).to(at_least_fp32(x.dtype))
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        v_BTHV = F.dropout(v_BTHV, self.dropout, self.training)
        decay_BTH = self.decay_proj(x).to(q_BTHK.dtype).sigmoid()
        if cache is None:
            states = [q_BTHK.new_zeros(len(x), *shape) for shape in self._state_shapes]
            steps = recurrent_steps(ctx.segments)
        else:
            states, steps = cache.append(ctx.segments, x.shape[1])
        updates = k_BTHK[..., None] * v_BTHV[..., None, :], k_BTHK
        (matrix_BTHKV, matrix), (norm_BTHK, norm) = (
            scan(*steps.mask(decay_BTH, update), state.to(update.dtype))
            for update, state in zip(updates, states, strict=True)
        )
        if cache is not None:
            cache.store(matrix, norm)
        y_BTHV = (matrix_BTHKV * q_BTHK[..., None]).sum(-2)
        y_BTHV = y_BTHV / (norm_BTHK * q_BTHK).sum(-1, keepdim=True).abs().clamp(min=1)
        return Out(self.o_proj(F.silu(self.g_proj(x)) * y_BTHV.flatten(2).to(x.dtype)))

    @property
    def _state_shapes(self) -> list[tuple[int, ...]]:
        return [(self.heads, self.key_dim, self.value_dim), (self.heads, self.key_dim)]

    def new_cache(
        self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> RecurrentCache:
        return RecurrentCache(batch_size, capacity, self._state_shapes, dtype, device)

    def flops(self, seq_len: int) -> int:
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return 2 * parameters + 6 * self.heads * self.key_dim * self.value_dim


def scan(decay_BTH: Tensor, update_BTHX: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return h_t = a_t h_{t-1} + b_t of all tokens (B, T, H, ...), and the last (B, H, ...)."""
    states = []
    for decay_BH, update in zip(decay_BTH.unbind(1), update_BTHX.unbind(1), strict=True):
        state = decay_BH.reshape(*decay_BH.shape, *[1] * (update.dim() - 2)) * state + update
        states.append(state)
    return (torch.stack(states, 1) if states else update_BTHX), state

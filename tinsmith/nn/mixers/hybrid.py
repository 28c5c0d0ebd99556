"""Tiny-R2's hybrid attention: up to three branches with latent queries, mixed per token and head.

    y_t = O sum_b g_t^b branch_b(q_t)      g_t = softmax_b or sigmoid of W x_t

The branches (compressed blocks, selected tokens, a window) are in `hybrid_branches`. `mode` names
Tiny-R2's combinations of branches, `branches` gives any other. A single branch has no gate. The
published code leaks future tokens, applies no window and never pools; this follows its description.

Legend: B rows, T tokens, H heads, N unrotated part of a head, R rotated part, V values, Z branches.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tinsmith.nn.attention.cache import KVCache
from tinsmith.nn.attention.compress import block_positions
from tinsmith.nn.attention.core import BranchGate
from tinsmith.nn.attention.latent import linear_flops
from tinsmith.nn.attention.span import Span
from tinsmith.nn.contract import BuildContext, Ctx, LayerCache, Mixer, Out, truncate_caches
from tinsmith.nn.layers.linear import ResidualProj
from tinsmith.nn.mixers.hybrid_branches import (
    BRANCHES,
    AttentionBranch,
    BranchedHeads,
    BranchInputs,
    BranchName,
)
from tinsmith.nn.precision import at_least_fp32

MODES: dict[str, tuple[BranchName, ...]] = {
    "nsa": ("compress", "select", "window"),
    "swa": ("compress", "window"),
    "dsa": ("compress", "select"),
}


@dataclass(frozen=True, kw_only=True)
class Hybrid(BranchedHeads):
    """Attention to compressed blocks, selected tokens and a window; the defaults are Tiny-R2's."""

    kind: Literal["hybrid"] = "hybrid"
    mode: Literal["nsa", "swa", "dsa"] | None = None  # null: nsa, unless branches are given
    branches: tuple[BranchName, ...] | None = None
    gate: Literal["softmax", "sigmoid"] = "softmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode is not None and self.branches is not None:
            raise ValueError(f"give mode={self.mode} or branches, not both")
        if not self.branch_names or len(set(self.branch_names)) < len(self.branch_names):
            raise ValueError(
                f"branches={list(self.branch_names)} must name at least one branch, each once"
            )

    @property
    def branch_names(self) -> tuple[BranchName, ...]:
        """The names of the branches."""
        return MODES[self.mode or "nsa"] if self.branches is None else self.branches

    def build(self, build_ctx: BuildContext) -> "HybridMixer":
        """Build the module."""
        return HybridMixer(self, build_ctx)


class HybridMixer(Mixer):
    """The module of `Hybrid`."""

    def __init__(self, config: Hybrid, build_ctx: BuildContext):
        super().__init__()
        self.config, self.dim = config, build_ctx.dim
        self.rotary_dim = config.rope_dim if build_ctx.use_rope else None
        self.window = config.window if "window" in config.branch_names else None
        self.nope_factor = build_ctx.attention_scaling**2
        self.dropout = build_ctx.attention_dropout
        self.queries = config.build_queries(build_ctx.dim)
        branches = {name: BRANCHES[name](config, build_ctx) for name in config.branch_names}
        self.branches = cast(Mapping[str, AttentionBranch], nn.ModuleDict(branches))
        gates = config.heads * len(branches)
        self.branch_gate = BranchGate(build_ctx.dim, gates) if len(branches) > 1 else None
        self.o_proj = ResidualProj(config.heads * config.v_dim, build_ctx.dim, bias=False)

    def forward(self, x: Tensor, ctx: Ctx, cache: Any = None) -> Out:
        """Map x (B, T, D) to Out.y (B, T, D); in training, with the loss of the indexer."""
        rotary = ctx.rotary[self.rotary_dim] if self.rotary_dim else None
        nope_BTHN, rope_BTHR, source = self.queries(x, rotary)
        if cache is None:
            span, num_keys = ctx.span(), x.shape[1]
        else:
            span, num_keys = cache.append(ctx.segments, x)
        positions = block_positions(span, x.shape[1], num_keys, x.device)
        dropout = self.dropout if self.training else 0.0
        nope_BTHN = nope_BTHN * self.nope_factor
        inputs = BranchInputs(
            x, nope_BTHN, rope_BTHR, source, rotary, ctx, span, positions, dropout
        )
        outputs, losses = [], {}
        for name, branch in self.branches.items():
            y_BTHV, branch_losses = branch(
                inputs, None if cache is None else cache.branch_caches[name]
            )
            outputs.append(y_BTHV)
            losses |= branch_losses
        return Out(self.o_proj(self._mix(x, outputs).flatten(2)), losses)

    def _mix(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        if self.branch_gate is None:
            return outputs[0]
        scores_BTHZ = (
            self.branch_gate(x).to(at_least_fp32(x.dtype)).unflatten(-1, (-1, len(outputs)))
        )
        use_softmax = self.config.gate == "softmax"
        gates_BTHZ = scores_BTHZ.softmax(-1) if use_softmax else scores_BTHZ.sigmoid()
        gated = (gate * y for gate, y in zip(gates_BTHZ[..., None].unbind(3), outputs, strict=True))
        return sum(gated, start=torch.zeros_like(outputs[0])).to(outputs[0].dtype)

    def new_cache(
        self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """Create the caches of all branches."""
        branch_caches = {
            name: branch.new_cache(batch_size, capacity, dtype, device)
            for name, branch in self.branches.items()
        }
        return HybridCache(branch_caches, KVCache(batch_size, capacity, [(0,)], dtype, device))

    def flops(self, seq_len: int) -> int:
        """Count projections, and the branches at the mean number of visible tokens."""
        branch_flops = sum(branch.flops(seq_len) for branch in self.branches.values())
        return int(linear_flops(self) + branch_flops)


class HybridCache:
    """The caches of all branches, and one shared count of tokens."""

    def __init__(self, branch_caches: dict[str, Any], token_counter: KVCache):
        self.branch_caches = branch_caches
        self.token_counter = token_counter

    @property
    def lengths(self) -> Tensor:
        """Number of cached tokens of each row, (B,)."""
        return self.token_counter.lengths

    def append(self, segments_BT: Tensor | None, x: Tensor) -> tuple[Span, int]:
        """Count the tokens of a call; return their span and the number of all tokens so far."""
        (counted,), span = self.token_counter.append(segments_BT, x[..., :0])
        return span, counted.shape[1]

    def select(self, rows: Tensor) -> None:
        """Select, reorder or repeat rows."""
        for cache in (*self.branch_caches.values(), self.token_counter):
            cache.select(rows)

    def check_truncate(self, lengths: Tensor) -> None:
        """Raise CannotTruncate if a window or a block has dropped tokens."""
        for cache in (*self.branch_caches.values(), self.token_counter):
            cache.check_truncate(lengths)

    def truncate(self, lengths: Tensor) -> None:
        """Remove the newest tokens."""
        truncate_caches((*self.branch_caches.values(), self.token_counter), lengths)

    def join(self, other: "HybridCache") -> None:
        """Append the rows of another cache."""
        for name, cache in self.branch_caches.items():
            cache.join(other.branch_caches[name])
        self.token_counter.join(other.token_counter)

    def nbytes(self) -> int:
        """Return the bytes of the branch caches."""
        return sum(cache.nbytes() for cache in self.branch_caches.values())

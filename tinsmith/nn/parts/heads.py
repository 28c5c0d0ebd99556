"""What mixers with heads share: sizes of grouped heads, and the gate that mixes branches."""

from typing import ClassVar, Literal

from torch import nn

from tinsmith.nn.contract import MixerKind


class GroupedHeads(MixerKind):
    """Sizes of a mixer whose `heads` query heads share `kv_heads` key and value heads."""

    heads: int
    kv_heads: int | None
    head_dim: int | None
    value_residual: bool
    rope: bool

    @property
    def groups(self) -> int:
        """Key and value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    def width(self, dim: int) -> int:
        """Numbers per head at model width `dim`."""
        return self.head_dim or dim // self.heads

    def check(self, dim: int) -> None:
        """Head widths must be whole, and even where they are rotated."""
        if self.head_dim is None and dim % self.heads:
            raise ValueError(
                f"dim={dim} must be a multiple of heads={self.heads}, or head_dim be given"
            )
        if self.rope and self.width(dim) % 2:
            raise ValueError(
                f"head_dim={self.width(dim)} must be even to be rotated (or rope: false)"
            )

    def value_shape(self, dim: int) -> tuple[int, int] | None:
        """(kv_heads, head_dim) where values are shared between layers."""
        return (self.groups, self.width(dim)) if self.value_residual else None


class BranchGate(nn.Linear):
    """Scores branches; each row of its weight is for one branch of one head."""

    ROLE: ClassVar[Literal["router"]] = "router"

"""What an objective may ask of the run and of its other processes."""

from typing import Protocol

from torch import Tensor


class Peers(Protocol):
    """What an objective may ask of the run that it is part of, and of its other processes."""

    def poll(self, busy: bool = False) -> bool:
        """To be called wherever time is spent, equally often by all processes: a stop that any was
        asked for interrupts all of them. Whether any of them is `busy`.
        """
        ...

    def gather(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """What every process has, in the order of ranks; shapes may differ."""
        ...


class SingleProcess:
    """No run and no other processes."""

    def poll(self, busy: bool = False) -> bool:
        """Return `busy`: there are no other processes."""
        return busy

    def gather(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """What there is."""
        return [tensors]

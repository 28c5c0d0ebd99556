"""Communication between the processes of a run, as objectives use it."""

from typing import Protocol

from torch import Tensor


class Peers(Protocol):
    """The run of an objective and its other processes."""

    def poll(self, busy: bool = False) -> bool:
        """Return True if any process is `busy`. Call it regularly and equally often on all
        processes: a stop request to any of them interrupts all.
        """
        ...

    def gather(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return the tensors of every process, in the order of ranks. Shapes may differ."""
        ...


class SingleProcess:
    """A single process without a run."""

    def poll(self, busy: bool = False) -> bool:
        """Return `busy`: there are no other processes."""
        return busy

    def gather(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return the tensors of this process."""
        return [tensors]

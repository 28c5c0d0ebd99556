"""Lines that tell how far a long job is, and the place where a stop request is noticed."""

import time
from collections.abc import Callable

from tinsmith.core.errors import Stopped
from tinsmith.core.units import duration, size


class Progress:
    """Says every few seconds how many of `total` bytes are done (`total` None: not known)."""

    def __init__(
        self,
        desc: str,
        total: int | None,
        say: Callable[[str], None],
        stop: Callable[[], bool] | None = None,
        every: float = 5.0,
    ):
        self.desc, self.total, self.done = desc, total, 0
        self._say, self._stop, self._every = say, stop, every
        self._began = self._told = time.monotonic()

    def advance(self, amount: int) -> None:
        """Count `amount` more bytes. Raises Stopped where a stop was asked for."""
        self.done += amount
        if self._stop and self._stop():
            raise Stopped(f"stopped while {self.desc}; nothing was changed")
        now = time.monotonic()
        if now - self._told >= self._every:
            self._told = now
            self._say(f" prepare   {self.desc}: {self._state(now - self._began)}")

    def _state(self, elapsed: float) -> str:
        rate = self.done / elapsed
        if not self.total:
            return f"{size(self.done)}  {size(rate)}/s"
        left = max(0, self.total - self.done) / max(rate, 1)
        return f"{100 * self.done / self.total:3.0f}%  {size(rate)}/s  eta {duration(left)}"

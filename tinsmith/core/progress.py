"""Progress lines of long jobs. Each update also checks for a stop request."""

import time
from collections.abc import Callable

from tinsmith.core.errors import Stopped
from tinsmith.core.units import format_duration, format_size


class Progress:
    """Print every few seconds how many of `total` bytes are done (`total` None: unknown)."""

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
        self._began = self._reported = time.monotonic()

    def advance(self, amount: int) -> None:
        """Add `amount` bytes. Raise Stopped if a stop was requested."""
        self.done += amount
        if self._stop and self._stop():
            raise Stopped(f"stopped while {self.desc}; nothing was changed")
        now = time.monotonic()
        if now - self._reported >= self._every:
            self._reported = now
            self._say(f" prepare   {self.desc}: {self._state(now - self._began)}")

    def _state(self, elapsed: float) -> str:
        rate = self.done / elapsed
        if not self.total:
            return f"{format_size(self.done)}  {format_size(rate)}/s"
        remaining = max(0, self.total - self.done) / max(rate, 1)
        percent = f"{100 * self.done / self.total:3.0f}%"
        return f"{percent}  {format_size(rate)}/s  eta {format_duration(remaining)}"

"""Speed of training since the last line, without the time of evaluation, samples and saves."""

import time


class Clock:
    """Counts seconds that were spent on steps."""

    def __init__(self, tokens: int):
        self._since = time.monotonic()
        self._paused = 0.0
        self._tokens = tokens

    def pause(self, seconds: float) -> None:
        """These seconds were not spent on steps."""
        self._paused += seconds

    def speed(self, now: float, tokens: int) -> float:
        """Tokens per second since the last call."""
        seconds = max(now - self._since - self._paused, 1e-9)
        speed = (tokens - self._tokens) / seconds
        self._since, self._paused, self._tokens = now, 0.0, tokens
        return max(speed, 1e-9)

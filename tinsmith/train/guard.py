"""Count steps whose loss or gradient is not finite, and detect loss spikes."""

import statistics
from collections import deque

from tinsmith.core.errors import Failure


class TooManyNonfiniteSteps(Failure):
    """Training cannot continue. The message names the last good checkpoint."""


class Guard:
    """Counter of steps with NaN or infinity. More than `limit` in a row end the run."""

    def __init__(self, limit: int):
        self.limit = limit
        self.total = 0
        self.consecutive = 0

    def update(self, healthy: bool) -> None:
        """Count one step."""
        self.consecutive = 0 if healthy else self.consecutive + 1
        self.total += not healthy

    @property
    def exceeded(self) -> bool:
        """True after more than `limit` such steps in a row."""
        return self.consecutive > self.limit

    def state(self) -> list[int]:
        """Return the state for a checkpoint."""
        return [self.total, self.consecutive]

    def load_state(self, saved: list[int]) -> None:
        """Restore what `state` returned."""
        self.total, self.consecutive = saved


class LossSpikeDetector:
    """Detects a logged loss far above the earlier ones, a sign of bad data or a high learning rate.

    A spike exceeds the median of the last 50 losses by more than a tenth of it and by more than 8
    times their median absolute deviation, which single outliers do not change. The history is then
    cleared, so a loss that stays high is reported once.
    """

    MIN_HISTORY, WINDOW = 10, 50

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=self.WINDOW)

    def update(self, loss: float) -> float | None:
        """Add a loss. Return the median of the losses before it if it is a spike."""
        median = statistics.median(self.recent) if len(self.recent) >= self.MIN_HISTORY else loss
        spread = statistics.median([abs(each - median) for each in self.recent] or [0.0])
        is_spike = loss > median + max(8 * spread, abs(median) / 10)
        if is_spike:
            self.recent.clear()
        self.recent.append(loss)
        return median if is_spike else None

    def state(self) -> list[float]:
        """Return the state for a checkpoint."""
        return list(self.recent)

    def load_state(self, saved: list[float]) -> None:
        """Restore what `state` returned."""
        self.recent = deque(saved, maxlen=self.WINDOW)

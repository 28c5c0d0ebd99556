"""What happens when a step's numbers are not numbers: it never reaches the weights; and a word
where the loss leaps.
"""

import statistics
from collections import deque

from tinsmith.core.errors import Failure


class TooManyNonfiniteSteps(Failure):
    """Training cannot go on; the message names the last good checkpoint."""


class Guard:
    """Counts steps whose loss or gradient was NaN or infinite; too many in a row end the run."""

    def __init__(self, limit: int):
        self.limit = limit
        self.total = 0
        self.consecutive = 0

    def update(self, healthy: bool) -> None:
        """Note one step."""
        self.consecutive = 0 if healthy else self.consecutive + 1
        self.total += not healthy

    @property
    def exceeded(self) -> bool:
        """More bad steps in a row than allowed."""
        return self.consecutive > self.limit

    def state(self) -> list[int]:
        """What a checkpoint keeps."""
        return [self.total, self.consecutive]

    def load_state(self, saved: list[int]) -> None:
        """Put back what `state` gave."""
        self.total, self.consecutive = saved


class LossSpikeDetector:
    """Notices a logged loss far above those before it: worth a look at data and learning rate.

    Far: above the median of the last 50 by more than a tenth of it and by more than 8 times their
    median distance from it, which single outliers do not move. After a leap it begins anew, so a
    loss that stays high is told once.
    """

    MIN_HISTORY, WINDOW = 10, 50

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=self.WINDOW)

    def update(self, loss: float) -> float | None:
        """Note a loss; the median before it, if it is far above that."""
        usual = statistics.median(self.recent) if len(self.recent) >= self.MIN_HISTORY else loss
        spread = statistics.median([abs(each - usual) for each in self.recent] or [0.0])
        leapt = loss > usual + max(8 * spread, abs(usual) / 10)
        if leapt:
            self.recent.clear()
        self.recent.append(loss)
        return usual if leapt else None

    def state(self) -> list[float]:
        """What a checkpoint keeps."""
        return list(self.recent)

    def load_state(self, saved: list[float]) -> None:
        """Put back what `state` gave."""
        self.recent = deque(saved, maxlen=self.WINDOW)

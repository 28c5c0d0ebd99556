"""What happens when a step's numbers are not numbers: it never reaches the weights."""

from tinsmith.core.errors import Failure


class TooManyBadSteps(Failure):
    """Training cannot go on; the message names the last good checkpoint."""


class Guard:
    """Counts steps whose loss or gradient was NaN or infinite; too many in a row end the run."""

    def __init__(self, limit: int):
        self.limit = limit
        self.total = 0
        self.in_a_row = 0

    def saw(self, healthy: bool) -> None:
        """Note one step."""
        self.in_a_row = 0 if healthy else self.in_a_row + 1
        self.total += not healthy

    @property
    def lost(self) -> bool:
        """More bad steps in a row than allowed."""
        return self.in_a_row > self.limit

    def state(self) -> list[int]:
        """What a checkpoint keeps."""
        return [self.total, self.in_a_row]

    def restore(self, saved: list[int]) -> None:
        """Put back what `state` gave."""
        self.total, self.in_a_row = saved

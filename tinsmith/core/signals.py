"""Stop requests: SIGTERM and SIGINT ask for one checkpoint and an end, SIGUSR1 for a checkpoint
and no end.
"""

import os
import signal
import sys
from types import FrameType


class StopFlag:
    """Installed once by a long-running verb; polled wherever time is spent.

    The first SIGINT or SIGTERM sets `stop`; a second SIGINT ends the process at once. SIGUSR1 sets
    `save`.
    """

    def __init__(self) -> None:
        self.stop = False
        self.save = False

    def install(self) -> "StopFlag":
        """Take over the three signals; returns itself."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGUSR1, self._on_save)
        return self

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop and number == signal.SIGINT:
            os._exit(130)
        if not self.stop and number == signal.SIGINT:
            os.write(
                sys.stderr.fileno(), b"\n^C     stopping after this step (again to quit now)\n"
            )
        self.stop = True

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self.save = True

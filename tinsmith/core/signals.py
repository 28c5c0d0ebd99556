"""Signal handling: SIGTERM, SIGINT and SIGHUP request a checkpoint and a stop, SIGUSR1 only a
checkpoint.

SIGHUP arrives when a terminal is closed. `nohup` ignores it, and then it stays ignored.
"""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any


class StopFlag:
    """Flags set by signals inside `with StopFlag() as flag:`. Long-running code polls them.

    The first SIGINT, SIGTERM or SIGHUP sets `stop`; a second SIGINT ends the process at once.
    SIGUSR1 sets `save`.
    """

    def __init__(self) -> None:
        self.stop = False
        self.save = False
        self._before: dict[signal.Signals, Any] = {}
        self._handlers = {
            signal.SIGINT: self._on_stop,
            signal.SIGTERM: self._on_stop,
            signal.SIGUSR1: self._on_save,
        }
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self._handlers[signal.SIGHUP] = self._on_stop

    def __enter__(self) -> "StopFlag":
        """Install the signal handlers. Outside the main thread Python does not allow that, and only
        the flag exists.
        """
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._handlers.items():
                self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

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

"""Kill points: counted events at which a fault test can kill the process.

`TINSMITH_KILL_AT=17` sends SIGKILL, or the signal in `TINSMITH_KILL_BY`, at the 17th event. Unlike
a kill after some seconds, it hits the same instruction on a fast and on a slow machine.
`TINSMITH_COUNT_EVENTS=FILE` writes the names of all events that a run passed, so that a test can
pick some of them.
"""

import atexit
import functools
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path


def kill_point(name: str) -> None:
    """Mark a point at which a test may kill the process. Costs almost nothing outside of tests."""
    if record_event := _event_recorder():
        record_event(name)


@functools.cache
def _event_recorder() -> Callable[[str], None] | None:
    """Return the function that counts events, or None if no environment variable is set."""
    limit = int(os.environ.get("TINSMITH_KILL_AT", "0"))
    report = os.environ.get("TINSMITH_COUNT_EVENTS")
    if not limit and not report:
        return None
    sent_signal = signal.Signals[os.environ.get("TINSMITH_KILL_BY", "SIGKILL")]
    counter = itertools.count(1)
    names: list[str] = []

    def record_event(name: str) -> None:
        names.append(name)
        if next(counter) == limit:
            os.kill(os.getpid(), sent_signal)

    if report:
        atexit.register(lambda: Path(report).write_text("\n".join(names), encoding="utf-8"))
    return record_event

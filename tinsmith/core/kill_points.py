"""Counted events at which a test may kill the process: `TINSMITH_KILL_AT=17` means SIGKILL at the
17th, or the signal that `TINSMITH_KILL_BY` names.

A kill at a counted event is the same on a fast and on a slow machine, which a kill after some
seconds is not. `TINSMITH_COUNT_EVENTS=FILE` writes how many events a run passed, so that a test can
choose among them.
"""

import atexit
import functools
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path


def event(name: str) -> None:
    """Call with a name where a sudden death would be interesting; nearly free outside of tests."""
    if passed := _watcher():
        passed(name)


@functools.cache
def _watcher() -> Callable[[str], None] | None:
    """What the environment asks for, at the first event."""
    limit = int(os.environ.get("TINSMITH_KILL_AT", "0"))
    report = os.environ.get("TINSMITH_COUNT_EVENTS")
    if not limit and not report:
        return None
    sent = signal.Signals[os.environ.get("TINSMITH_KILL_BY", "SIGKILL")]
    counter = itertools.count(1)
    names: list[str] = []

    def passed(name: str) -> None:
        names.append(name)
        if next(counter) == limit:
            os.kill(os.getpid(), sent)

    if report:
        atexit.register(lambda: Path(report).write_text("\n".join(names), encoding="utf-8"))
    return passed

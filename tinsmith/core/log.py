"""Where a run speaks: aligned lines on the terminal, the same in `log.txt`, numbers in
`metrics.jsonl`.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Metrics = dict[str, Any]


def say(line: str, *, err: bool = False) -> None:
    """One line for a person, at once."""
    print(line, file=sys.stderr if err else sys.stdout, flush=True)


def warn(line: str) -> None:
    """A warning for a person, on standard error."""
    say(f" warning {line}", err=True)


class RunLog:
    """Lines and metrics of one run. Silent on every rank but the first."""

    def __init__(self, folder: Path | None, *, quiet: bool = False):
        self.folder = folder
        self.quiet = quiet
        self.listeners: list[Callable[[Metrics], None]] = []
        self.closers: list[Callable[[], None]] = []

    def line(self, text: str) -> None:
        """Print a line and keep it in `log.txt`."""
        if self.quiet:
            return
        say(text)
        if self.folder:
            with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def metrics(self, values: Metrics) -> None:
        """Append one object to `metrics.jsonl` (numbers that are not finite become null) and
        tell the trackers.
        """
        if self.quiet or not self.folder:
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(values)) + "\n")
        for listener in self.listeners:
            listener(values)

    def close(self) -> None:
        """Let the trackers finish."""
        for closer in self.closers:
            closer()

    def cut(self, step: int) -> None:
        """Forget metrics after `step`: a resumed run writes them again."""
        if self.quiet or not self.folder:
            return
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
            from tinsmith.core.files import atomic_write

            atomic_write(path, "".join(line + "\n" for line in kept))


def finite(values: Any) -> Any:
    """The same values with NaN and infinity as None, which JSON can say."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return None
    return values


def read_metrics(path: Path) -> list[Metrics]:
    """All whole lines of a `metrics.jsonl`; a torn last line (killed while writing) is left out."""
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")[:-1]
    return [line for line in lines if line.startswith("{") and line.endswith("}")]

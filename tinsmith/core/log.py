"""Run log: lines on the terminal and in `log.txt`, metrics in `metrics.jsonl`."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

Metrics = dict[str, Any]


def print_line(line: str, *, err: bool = False) -> None:
    """Print one line and flush."""
    print(line, file=sys.stderr if err else sys.stdout, flush=True)


def print_warning(line: str) -> None:
    """Print a warning on standard error."""
    print_line(f" warning {line}", err=True)


class RunLog:
    """Lines and metrics of one run. With `quiet` (ranks other than 0) nothing is written."""

    def __init__(self, folder: Path | None, *, quiet: bool = False):
        self.folder = folder
        self.quiet = quiet
        self.listeners: list[Callable[[Metrics], None]] = []
        self.closers: list[Callable[[], None]] = []

    def line(self, text: str) -> None:
        """Print a line and append it to `log.txt`."""
        if self.quiet:
            return
        print_line(text)
        if self.folder:
            with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def metrics(self, values: Metrics) -> None:
        """Append one object to `metrics.jsonl` and pass it to the trackers. NaN and infinity become
        null.
        """
        if self.quiet or not self.folder:
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(nonfinite_to_none(values)) + "\n")
        for listener in self.listeners:
            listener(values)

    def close(self) -> None:
        """Close the trackers."""
        for closer in self.closers:
            closer()

    def truncate(self, step: int) -> None:
        """Remove metrics after `step`, because a resumed run writes them again."""
        if self.quiet or not self.folder:
            return
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = [line for line in _complete_lines(path) if json.loads(line)["step"] <= step]
            from tinsmith.core.files import atomic_write

            atomic_write(path, "".join(line + "\n" for line in lines))


def nonfinite_to_none(values: Any) -> Any:
    """Replace NaN and infinity by None, because JSON has no notation for them."""
    if isinstance(values, dict):
        return {
            key: nonfinite_to_none(value) for key, value in cast("dict[str, Any]", values).items()
        }
    if isinstance(values, list | tuple):
        return [nonfinite_to_none(value) for value in cast("list[Any]", values)]
    if isinstance(values, float) and not math.isfinite(values):
        return None
    return values


def read_metrics(path: Path) -> list[Metrics]:
    """Read all complete lines of a `metrics.jsonl`. A truncated last line is skipped."""
    return [json.loads(line) for line in _complete_lines(path)]


def _complete_lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")[:-1]
    return [line for line in lines if line.startswith("{") and line.endswith("}")]

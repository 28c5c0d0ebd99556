"""Run log: lines on the terminal and in `log.txt`, metrics in `metrics.jsonl`."""

import io
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

Metrics = dict[str, Any]


def print_line(line: str, *, err: bool = False) -> None:
    """Print one line and flush."""
    print(line, file=sys.stderr if err else sys.stdout, flush=True)


def escape_unencodable() -> None:
    """Print characters that the terminal's encoding lacks as escapes, such as those of a sample."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


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
        self._unwritable: set[str] = set()

    def line(self, text: str) -> None:
        """Print a line and append it to `log.txt`."""
        if self.quiet:
            return
        try:
            print_line(text)
        except OSError:  # the reader of a pipe has gone: go on with log.txt
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        self._append("log.txt", text)

    def metrics(self, values: Metrics) -> None:
        """Append one object to `metrics.jsonl` and pass it to the trackers. NaN and infinity become
        null.
        """
        if self.quiet or not self.folder:
            return
        self._append("metrics.jsonl", json.dumps(nonfinite_to_none(values)))
        for listener in self.listeners:
            listener(values)

    def _append(self, name: str, line: str) -> None:
        """Append a line to a file of the run. If that fails, warn once and go on without it."""
        if not self.folder:
            return
        try:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            if name not in self._unwritable:
                self._unwritable.add(name)
                print_warning(
                    f"{self.folder / name} cannot be written: {error.strerror}; training goes on"
                )

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

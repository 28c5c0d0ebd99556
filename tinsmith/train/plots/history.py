"""Read a run's `metrics.jsonl`. The run may have been killed at any moment, so a line that is not
complete JSON is skipped.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinsmith.core.errors import UserError


class Series:
    """Values by step: `steps` (n,) and `values` (n,), both float64 and finite."""

    def __init__(self, points: list[tuple[float, float]]):
        table = np.array(points, dtype=np.float64).reshape(-1, 2)
        self.steps: NDArray[np.float64] = table[:, 0]
        self.values: NDArray[np.float64] = table[:, 1]

    def __len__(self) -> int:
        return len(self.steps)

    def smooth(self) -> NDArray[np.float64]:
        """Return a weighted moving average (n,) with triangular weights over a twentieth of the
        series on each side. Near the start the window is shorter and symmetric, so that a steep
        beginning stays steep.
        """
        count = len(self)
        reach = count // 20
        smoothed = self.values.copy()
        for i in range(1, count):
            near = min(reach, i)
            span = slice(i - near, i + near + 1)
            weights = np.bartlett(2 * near + 3)[1:-1][: min(near + 1, count - i) + near]
            smoothed[i] = self.values[span] @ weights / weights.sum()
        return smoothed


class History:
    """The lines of a run's `metrics.jsonl`, in order."""

    def __init__(self, name: str, lines: list[dict[str, Any]]):
        self.name = name
        self._lines = lines

    @classmethod
    def read(cls, folder: Path) -> "History":
        """Read the metrics of a run; empty before the first line. Raise UserError if the folder is
        missing.
        """
        if not folder.is_dir():
            raise UserError(f"{folder}: no such run; `tinsmith runs` lists them")
        path = folder / "metrics.jsonl"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        lines = [line for raw in text.split("\n") if (line := _parsed(raw)) is not None]
        return cls(folder.resolve().name, lines)

    @property
    def step(self) -> int:
        """Return the last step of any line."""
        return max((line["step"] for line in self._lines), default=0)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Return the lines of one kind."""
        return [line for line in self._lines if line["kind"] == kind]

    def series(self, kind: str, key: str) -> Series:
        """Return step and value of every line of `kind` that has a finite number under `key`."""
        lines = self.of_kind(kind)
        return Series([(line["step"], line[key]) for line in lines if is_number(line.get(key))])

    def keys(self, kind: str) -> list[str]:
        """Return every key of the lines of a kind, in the order of first appearance."""
        return list(dict.fromkeys(key for line in self.of_kind(kind) for key in line))


def is_number(value: Any) -> bool:
    """Return True for a finite int or float, but not for a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _parsed(raw: str) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    sound = isinstance(line, dict) and isinstance(line.get("step"), int)
    return line if sound and isinstance(line.get("kind"), str) else None

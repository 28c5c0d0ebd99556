"""Helpers of all benchmarks: description of the machine, interleaved timing, table, JSON file.

Run a benchmark with `python benchmarks/NAME.py`. The contestants take turns in every round, so that
other load on the machine affects all of them. Medians over rounds are compared.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Return a description of the machine and of the library versions."""
    facts: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if platform.system() == "Linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def interleave(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of every round by name. Each round runs every contestant once, in turn.

    The order rotates by one from round to round, so that no contestant always runs with the caches
    of the same predecessor. The first `warmup` rounds are not counted.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-warmup, rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            _synchronize()
            start = time.perf_counter()
            contestants[name]()
            _synchronize()
            if index >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median seconds of a round of every contestant."""
    return {name: statistics.median(rounds) for name, rounds in seconds.items()}


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table: text left-aligned, numbers right-aligned with four digits."""
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [isinstance(value, int | float) for value in rows[0].values()]
    for line in lines:
        cells = zip(line, widths, right, strict=True)
        print("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in cells).rstrip())


def write(name: str, data: Mapping[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json with the machine, the date and `data`; return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), **data}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

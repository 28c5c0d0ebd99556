"""What every benchmark shares: the machine's name, interleaved timing, a table, a JSON file.

Run one as `python benchmarks/NAME.py`. Contestants take turns within every round, so that a busy
moment of the machine hits all of them, and medians over rounds are compared.
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
    """What the numbers were measured on."""
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
    """Seconds of every round by name; each round runs every contestant once, in turn.

    The first of a round moves on by one from round to round, so that nobody always follows the same
    neighbour's caches. `warmup` rounds come first and are not counted.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            _settle()
            start = time.perf_counter()
            contestants[name]()
            _settle()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The middle round of every contestant, in seconds."""
    return {name: statistics.median(rounds) for name, rounds in seconds.items()}


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of equal keys, aligned: text to the left, numbers to the right in 4 digits."""
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [isinstance(value, int | float) for value in rows[0].values()]
    for line in lines:
        cells = zip(line, widths, right, strict=True)
        print("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in cells).rstrip())


def write(name: str, data: Mapping[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json: the machine, the date, and `data`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), **data}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def _settle() -> None:
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

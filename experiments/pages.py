"""What the pages of all experiments have in common."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def publish(folder: Path, intro: str, *parts: str) -> None:
    """README.md: what was done, what came out in words, the numbers. The words are `answers.md`,
    written by hand once the numbers were looked at.
    """
    reported = folder / "answers.md"
    answers = [reported.read_text(encoding="utf-8")] if reported.exists() else []
    page = "\n".join([intro, *answers, *parts])
    (folder / "README.md").write_text(page, encoding="utf-8")


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation; nothing where there are no values."""
    if not values:
        return ""
    around = statistics.stdev(values) if values[1:] else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {around:.{digits}f}"


def save(figure: Any, path: Path) -> None:
    """A picture, its parts moved apart."""
    figure.tight_layout()
    figure.savefig(path, dpi=110)

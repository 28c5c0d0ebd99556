"""Helpers that write the pages of the experiments."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_page(folder: Path, intro: str, *parts: str) -> None:
    """Write README.md: the introduction, the findings and the tables. The findings are the file
    `findings.md`, which is written by hand when the results are known.
    """
    path = folder / "findings.md"
    findings = [path.read_text(encoding="utf-8")] if path.exists() else []
    page = "\n".join([intro, *findings, *parts])
    (folder / "README.md").write_text(page, encoding="utf-8")


def mean_and_std(values: Sequence[float], digits: int) -> str:
    """Return mean and standard deviation as text, empty if there are no values."""
    if not values:
        return ""
    deviation = statistics.stdev(values) if values[1:] else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def save_figure(figure: Any, path: Path) -> None:
    """Save a figure with tight layout."""
    figure.tight_layout()
    figure.savefig(path, dpi=110)

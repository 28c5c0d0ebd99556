"""Reports of a run from its `metrics.jsonl`: plots (`loss`, `experts`), `samples.md`, and the table
of `tinsmith runs`. They work for killed runs too.
"""

import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tinsmith.core.errors import UserError
from tinsmith.core.files import atomic_write
from tinsmith.core.yamlfile import read_yaml
from tinsmith.train.plots.experts import draw_experts
from tinsmith.train.plots.history import History
from tinsmith.train.plots.loss import draw_run, draw_runs
from tinsmith.train.plots.style import render_figures

_STEP = re.compile(r"step-(\d+)")


def plot_run(folder: Path) -> Path:
    """Plot `loss.png` and `loss.svg` into a run's folder, and with experts `experts.png` and
    `experts.svg`. Return the path of `loss.png`.

    Equal metrics of equally named runs give equal files. Raise UserError if the folder is missing.
    """
    history = History.read(folder)
    drawn = {"loss": draw_run}
    if history.of_kind("routing"):
        drawn["experts"] = draw_experts
    for name, draw in drawn.items():
        for kind, data in render_figures(partial(draw, history), ("png", "svg")).items():
            atomic_write(folder / f"{name}.{kind}", data)
    return folder / "loss.png"


def plot_runs(folders: Sequence[Path], out: Path) -> Path:
    """Plot several runs in one picture, `out`, a .png or .svg file."""
    kind = out.suffix.removeprefix(".").lower()
    if kind not in ("png", "svg"):
        raise UserError(f"{out}: pictures are written as .png or .svg; choose one of these endings")
    if not out.parent.is_dir():
        raise UserError(f"{out}: the folder {out.parent} does not exist")
    histories = [History.read(folder) for folder in folders]
    atomic_write(out, render_figures(partial(draw_runs, histories), [kind])[kind])
    return out


def write_samples(folder: Path) -> Path:
    """Write `samples.md`, all samples of the run by step. Return its path."""
    history = History.read(folder)
    parts = [f"# Samples of {history.name}\n"]
    for line in history.of_kind("samples"):
        parts.append(f"## Step {line['step']:,}\n")
        for sample in line.get("samples") or []:
            parts.append(f"Prompt\n\n{_fenced(sample['prompt'])}")
            parts.append(f"Continuation\n\n{_fenced(sample['text'])}")
    if len(parts) == 1:
        parts.append("None yet.\n")
    atomic_write(folder / "samples.md", "\n".join(parts))
    return folder / "samples.md"


HEADLINE_METRICS = {"bpb": min, "accuracy": max, "reward": max, "divergence": min, "loss": min}
"""The first of these metrics that an evaluation has is reported, and which of its values is best.
"""


def runs_table(root: Path) -> list[dict[str, Any]]:
    """Return a dict for every run under `root`, the most recently written first.

    Keys: name, folder, objective (`unknown` if the recipe cannot be read), step, steps (then None),
    metric (of `HEADLINE_METRICS`), last and best (None before the first evaluation), age_seconds
    (since the last line of metrics), bytes (of the whole folder), finished.
    """
    if not root.is_dir():
        return []
    found = [path for path in sorted(root.iterdir()) if _is_run(path)]
    rows = [_row(folder) for folder in found]
    return sorted(rows, key=lambda row: row["age_seconds"])


def _is_run(path: Path) -> bool:
    marks = ("config.yaml", "metrics.jsonl", "checkpoints")
    return not path.name.startswith(".") and any((path / mark).exists() for mark in marks)


def _row(folder: Path) -> dict[str, Any]:
    history, config = History.read(folder), _config(folder)
    evaluations = {name: history.series("eval", name).values for name in HEADLINE_METRICS}
    metric = next((name for name, values in evaluations.items() if len(values)), None)
    values = evaluations[metric].tolist() if metric else []
    return {
        "name": folder.name,
        "folder": str(folder),
        "objective": _inside(config, "objective", "kind") or "unknown",
        "step": max(history.step, _saved_step(folder)),
        "steps": _inside(config, "train", "steps"),
        "metric": metric,
        "last": values[-1] if values else None,
        "best": HEADLINE_METRICS[metric](values) if metric else None,
        "age_seconds": max(0.0, time.time() - _last_change(folder)),
        "bytes": _bytes(folder),
        "finished": (folder / "final" / "config.json").is_file(),
    }


def _fenced(text: str) -> str:
    """Format text as a code block whose fence is longer than any inside."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    end = "" if text.endswith("\n") else "\n"
    return f"{fence}text\n{text}{end}{fence}\n"


def _config(folder: Path) -> Any:
    try:
        return read_yaml(folder / "config.yaml")
    except UserError:
        return None


def _inside(data: Any, *keys: str) -> Any:
    """Return the value under keys of nested dicts, or None if one is missing."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data


def _saved_step(folder: Path) -> int:
    names = [path.name for path in folder.glob("checkpoints/step-*")]
    return max((int(found[1]) for name in names if (found := _STEP.fullmatch(name))), default=0)


def _last_change(folder: Path) -> float:
    """Return the time of the last line of metrics, or of the folder if there is none."""
    metrics = folder / "metrics.jsonl"
    return (metrics if metrics.exists() else folder).stat().st_mtime


def _bytes(folder: Path) -> int:
    """Sum the bytes of all files in a folder. Another process may be writing to it."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total

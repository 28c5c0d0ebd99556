"""results.json as one page: README.md with a table, and three pictures."""

import json
import statistics
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from experiments.attention import cases
from experiments.pages import publish, save, spread

Row = dict[str, Any]

INTRO = """# Attention and residual streams, compared

Every mixer with every residual, models of equal numbers of parameters (about {parameters:,})
trained on equal tokens; mean and standard deviation over {seeds} seeds. Made by
`python -m experiments.attention.run`, which says what is measured and how; nothing here is chosen.

- **bits per byte** on held-back text, less is better;
- **needle**: share of single values recalled, mean over lengths 64 to 256 and depths 0 to 1
  (small models of their own, trained on 4 to 128 tokens);
- **8 pairs**: multi-query associative recall;
- **step**: time of a training step against `dense` with `plain`, all cases in turns
  (`--speed`); **cache**: bytes of a row of 1,024 tokens.
"""
NOTES = """
![Bits per byte](bpb.png)

![Recall of a needle by depth and length](needle.png)

![Recall of several pairs](pairs.png)
"""


def write(rows: Sequence[Row], folder: Path) -> None:
    """README.md and its pictures."""
    timed = folder / "speed.json"
    speed = json.loads(timed.read_text(encoding="utf-8")) if timed.exists() else {}
    lines = [
        "| mixer | residual | bits per byte | needle | 8 pairs | step | cache |",
        "|---|---|---|---|---|---|---|",
    ]
    for mixer, residual in product(cases.MIXERS, cases.RESIDUALS):
        mine = _of(rows, mixer, residual)
        if not mine:
            continue
        cells = [
            spread([row["bpb"] for row in mine], 3),
            spread([_needle(row) for row in mine], 2),
            spread([row["recall"]["pairs"]["8"] for row in mine], 2),
            f"{speed[f'{mixer} {residual}'] / speed['dense plain']:.1f}" if speed else "",
            f"{mine[0]['cache_bytes']:,}",
        ]
        lines.append(f"| {mixer} | {residual} | {' | '.join(cells)} |")
    seeds = len({row["seed"] for row in rows})
    intro = INTRO.format(parameters=rows[0]["parameters"], seeds=seeds)
    publish(folder, intro, "\n".join(lines), NOTES)
    _draw_bits(rows, folder / "bpb.png")
    _draw_needles(rows, folder / "needle.png")
    _draw_pairs(rows, folder / "pairs.png")


def _of(rows: Sequence[Row], mixer: str, residual: str) -> list[Row]:
    return [row for row in rows if (row["mixer"], row["residual"]) == (mixer, residual)]


def _needle(row: Row) -> float:
    return statistics.mean(row["recall"]["needle"].values())


def _mean(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    return statistics.mean(map(value, rows)) if rows else 0.0


def _draw_bits(rows: Sequence[Row], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4))
    for offset, residual in enumerate(cases.RESIDUALS):
        for place, mixer in enumerate(cases.MIXERS):
            values = [row["bpb"] for row in _of(rows, mixer, residual)]
            color, x = f"C{offset}", place + (offset - 1) * 0.2
            axis.plot(
                [x] * len(values), values, "o", color=color, label=residual if not place else ""
            )
    axis.set_xticks(range(len(cases.MIXERS)), cases.MIXERS)
    axis.set(ylabel="bits per byte, every seed")
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)


def _draw_needles(rows: Sequence[Row], path: Path) -> None:
    import matplotlib.pyplot as plt

    lengths = sorted({int(key.split()[0]) for key in rows[0]["recall"]["needle"]})
    depths = sorted({float(key.split()[1]) for key in rows[0]["recall"]["needle"]})
    figure, axes = plt.subplots(1, len(lengths), figsize=(12, 3.6), sharey=True)
    for axis, length in zip(axes, lengths, strict=True):
        for mixer in cases.MIXERS:
            mine = [row for row in rows if row["mixer"] == mixer]
            found = [
                _mean(mine, lambda row, key=f"{length} {depth}": row["recall"]["needle"][key])
                for depth in depths
            ]
            axis.plot(depths, found, "o-", label=mixer)
        axis.set(title=f"{length} tokens", xlabel="depth of the needle", ylim=(-0.05, 1.05))
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="recalled, all residuals and seeds")
    axes[0].legend()
    save(figure, path)


def _draw_pairs(rows: Sequence[Row], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(cases.RESIDUALS), figsize=(12, 3.6), sharey=True)
    for axis, residual in zip(axes, cases.RESIDUALS, strict=True):
        for mixer in cases.MIXERS:
            mine = _of(rows, mixer, residual)
            if not mine:
                continue
            numbers = sorted(map(int, mine[0]["recall"]["pairs"]))
            found = [
                _mean(mine, lambda row, key=str(number): row["recall"]["pairs"][key])
                for number in numbers
            ]
            axis.plot(numbers, found, "o-", label=mixer)
        axis.set(title=residual, xlabel="pairs among 128 tokens", ylim=(-0.05, 1.05))
        axis.set_xticks(numbers)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="recalled")
    axes[0].legend()
    save(figure, path)

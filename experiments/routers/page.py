"""results.json as one page: README.md with a table for each question, and two pictures."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.pages import publish, save, spread
from experiments.routers import cases

Row = dict[str, Any]

INTRO = """# Routers of experts, compared

Models of about {met:,} parameters that a token meets, trained for {steps:,} steps on the embedded
corpus, equal tokens; mean and standard deviation over {seeds} seeds. Made by
`python -m experiments.routers.run`, which says what is measured and how; nothing here is chosen.

- **bits per byte** on held-back modules, less is better;
- **met / all**: parameters that a token meets, if it has as many experts as its router aims at,
  and all of them, in millions;
- **active**: experts per token and layer that it had at the end (shared ones not counted), mean
  over layers; where it is not the aim, a token met more or fewer parameters than in other cases;
- **dead**: share of experts without a token at the end; **entropy**: nats, of a token's gate;
- **tells**: share of what there is to know about a token's class (letters, digits, ...) that one of
  its experts tells;
- **step**: seconds of a training step, against `dense`: medians of steps, and of seeds.
"""
NOTES = """
![Bits per byte](bpb.png)

How even the use of experts was, at the end, mean over layers and seeds; 1 is an even share.

![Use of experts](use.png)
"""
HEAD = (
    "| case | bits per byte | met / all | active | dead | entropy | tells | step |",
    "|---|---|---|---|---|---|---|---|",
)


def write(rows: Sequence[Row], folder: Path) -> None:
    """README.md and its pictures."""
    if not rows:
        return
    base = _step(_of(rows, "dense")) if _of(rows, "dense") else 0.0
    intro = INTRO.format(
        met=round(int(statistics.mean(row["met"] for row in rows)), -4),
        steps=rows[0]["steps"],
        seeds=len({row["seed"] for row in rows}),
    )
    parts: list[str] = []
    for title, names in cases.GROUPS.items():
        lines = [_line(name, _of(rows, name), base) for name in names if _of(rows, name)]
        if lines:
            parts.append("\n".join([f"## {title}\n", *HEAD, *lines]) + "\n")
    publish(folder, intro, *parts, NOTES)
    _draw_bits(rows, folder / "bpb.png")
    _draw_use(rows, folder / "use.png")


def _line(name: str, mine: Sequence[Row], base: float) -> str:
    routed = "use" in mine[0]
    cells = [
        spread([row["bpb"] for row in mine], 3),
        f"{mine[0]['met'] / 1e6:.2f} / {mine[0]['parameters'] / 1e6:.2f}",
        spread([row["active"] for row in mine], 2) if routed else "",
        f"{100 * _mean(mine, 'dead') / mine[0]['experts']:.0f} %" if routed else "",
        f"{_mean(mine, 'entropy'):.2f}" if routed else "",
        f"{100 * _mean(mine, 'share'):.0f} %" if routed else "",
        f"{_step(mine) / base:.2f}" if base else "",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _of(rows: Sequence[Row], case: str) -> list[Row]:
    return [row for row in rows if row["case"] == case]


def _step(rows: Sequence[Row]) -> float:
    return statistics.median(row["step_s"] for row in rows)


def _mean(rows: Sequence[Row], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def _draw_bits(rows: Sequence[Row], path: Path) -> None:
    import matplotlib.pyplot as plt

    widths = [len(names) for names in cases.GROUPS.values()]
    figure, axes = plt.subplots(1, len(widths), figsize=(13, 4.6), sharey=True, width_ratios=widths)
    for axis, (title, names) in zip(axes, cases.GROUPS.items(), strict=True):
        for place, name in enumerate(names):
            values = [row["bpb"] for row in _of(rows, name)]
            axis.plot([place] * len(values), values, "o", color="C0", alpha=0.7)
        axis.set_xticks(range(len(names)), names, rotation=55, ha="right", fontsize=8)
        axis.set_xlim(-0.5, len(names) - 0.5)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="bits per byte, every seed")
    save(figure, path)


def _draw_use(rows: Sequence[Row], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(cases.GROUPS), figsize=(13, 3.6), sharey=True)
    for axis, (title, names) in zip(axes, cases.GROUPS.items(), strict=True):
        for name in names:
            mine = [row["use"] for row in _of(rows, name) if "use" in row]
            if not mine:
                continue
            use = [statistics.mean(each) for each in zip(*mine, strict=True)]
            places = [(rank + 0.5) / len(use) for rank in range(len(use))]
            axis.plot(places, use, ".-", label=name)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xlabel="experts, most used first", ylim=(0, None))
        axis.set_xticks([0, 1], ["first", "last"])
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
        if axis.lines[1:]:
            axis.legend(fontsize=7)
    axes[0].set(ylabel="load / even share")
    save(figure, path)

"""Writes README.md with a table for each question, and two pictures, from results.json."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.pages import mean_and_std, save_figure, write_page
from experiments.routers import cases

Record = dict[str, Any]

INTRO = """# A comparison of routers and experts

All models have about {met:,} active parameters and train for {steps:,} steps on the same tokens of
the embedded corpus. The tables have mean and standard deviation over {seeds} seeds. The script
`python -m experiments.routers.run` made them, and its docstring describes the measurements. Nothing
was tuned.

- **bits per byte** on held-out modules, lower is better;
- **params**: active parameters of a token with as many experts as the router aims at, and all
  parameters, in millions;
- **active**: experts per token and layer at the end, mean over layers, without shared experts.
  Where it differs from the target, a token had more or fewer active parameters than in other cases;
- **dead**: share of experts without a token at the end; **entropy**: of a token's router, in nats;
- **MI**: mutual information of a token's class (letters, digits, ...) and an expert that processes
  it, relative to the entropy of the classes;
- **step**: time of a training step relative to `dense`, medians over steps and seeds.
"""
NOTES = """
![Bits per byte](bpb.png)

Load of each expert relative to a uniform load, at the end, mean over layers and seeds.

![Use of experts](use.png)
"""
HEAD = (
    "| case | bits per byte | params | active | dead | entropy | MI | step |",
    "|---|---|---|---|---|---|---|---|",
)


def write(records: Sequence[Record], folder: Path) -> None:
    """Write README.md and its pictures."""
    if not records:
        return
    base = _step(_of(records, "dense")) if _of(records, "dense") else 0.0
    intro = INTRO.format(
        met=round(int(statistics.mean(record["met"] for record in records)), -4),
        steps=records[0]["steps"],
        seeds=len({record["seed"] for record in records}),
    )
    parts: list[str] = []
    for title, names in cases.GROUPS.items():
        lines = [_line(name, _of(records, name), base) for name in names if _of(records, name)]
        if lines:
            parts.append("\n".join([f"## {title}\n", *HEAD, *lines]) + "\n")
    write_page(folder, intro, *parts, NOTES)
    _draw_bits(records, folder / "bpb.png")
    _draw_use(records, folder / "use.png")


def _line(name: str, records: Sequence[Record], base: float) -> str:
    routed = "use" in records[0]
    cells = [
        mean_and_std([record["bpb"] for record in records], 3),
        f"{records[0]['met'] / 1e6:.2f} / {records[0]['parameters'] / 1e6:.2f}",
        mean_and_std([record["active"] for record in records], 2) if routed else "",
        f"{100 * _mean(records, 'dead') / records[0]['experts']:.0f} %" if routed else "",
        f"{_mean(records, 'entropy'):.2f}" if routed else "",
        f"{100 * _mean(records, 'share'):.0f} %" if routed else "",
        f"{_step(records) / base:.2f}" if base else "",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _of(records: Sequence[Record], case: str) -> list[Record]:
    return [record for record in records if record["case"] == case]


def _step(records: Sequence[Record]) -> float:
    return statistics.median(record["step_s"] for record in records)


def _mean(records: Sequence[Record], key: str) -> float:
    return statistics.mean(record[key] for record in records)


def _draw_bits(records: Sequence[Record], path: Path) -> None:
    import matplotlib.pyplot as plt

    widths = [len(names) for names in cases.GROUPS.values()]
    figure, axes = plt.subplots(1, len(widths), figsize=(13, 4.6), sharey=True, width_ratios=widths)
    for axis, (title, names) in zip(axes, cases.GROUPS.items(), strict=True):
        for index, name in enumerate(names):
            values = [record["bpb"] for record in _of(records, name)]
            axis.plot([index] * len(values), values, "o", color="C0", alpha=0.7)
        axis.set_xticks(range(len(names)), names, rotation=55, ha="right", fontsize=8)
        axis.set_xlim(-0.5, len(names) - 0.5)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="bits per byte, every seed")
    save_figure(figure, path)


def _draw_use(records: Sequence[Record], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(cases.GROUPS), figsize=(13, 3.6), sharey=True)
    for axis, (title, names) in zip(axes, cases.GROUPS.items(), strict=True):
        for name in names:
            loads = [record["use"] for record in _of(records, name) if "use" in record]
            if not loads:
                continue
            use = [statistics.mean(each) for each in zip(*loads, strict=True)]
            positions = [(rank + 0.5) / len(use) for rank in range(len(use))]
            axis.plot(positions, use, ".-", label=name)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xlabel="experts, most used first", ylim=(0, None))
        axis.set_xticks([0, 1], ["first", "last"])
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
        if axis.lines[1:]:
            axis.legend(fontsize=7)
    axes[0].set(ylabel="load / even share")
    save_figure(figure, path)

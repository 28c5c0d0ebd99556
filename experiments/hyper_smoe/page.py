"""results.json as one page: README.md with a table for each question, and a picture."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.hyper_smoe import cases
from experiments.pages import publish, save, spread

Row = dict[str, Any]

INTRO = """# Hyper-SMoE: sparse students on a frozen skeleton

A dense teacher of each seed reaches {teacher:.3f} bits per byte. Every student then learns for
{steps:,} steps, equal tokens of the same text; all but those "from nothing" stand in the teacher's
own skeleton, frozen, and learn their feed-forwards from its soft labels. "Longer" adds the steps
that the teacher had, so that a skeleton's past is paid for, too. Mean and standard
deviation over {seeds} seeds. Made by `python -m experiments.hyper_smoe.run`, which says what is
measured and how; nothing here is chosen.

- **bits per byte** of held-back modules, less is better; **gap**: above the teacher's own;
- **divergence** from the teacher, nats per token, on text that the student had not seen before;
- **acting**: share of the teacher's feed-forward parameters that act on a token at the end, the
  gate not counted; **active** of {experts} experts; **dead**: experts without a token;
- **trained**: parameters, in thousands;
- **forward**: seconds of a forward pass over the teacher's; **step**: seconds of a training step
  (the teacher's own forward pass included, where it teaches): medians, and of seeds.
"""
HEAD = (
    "| case | bits per byte | gap | divergence | acting | active | dead | trained | forward "
    "| step |",
    "|---|---|---|---|---|---|---|---|---|---|",
)
NOTES = """
![Divergence](divergence.png)
"""


def write(rows: Sequence[Row], folder: Path) -> None:
    """README.md and its picture."""
    if not rows:
        return
    teachers = {row["seed"]: row["teacher"] for row in rows}
    intro = INTRO.format(
        teacher=statistics.mean(teachers.values()),
        steps=min(row["steps"] for row in rows),
        seeds=len(teachers),
        experts=cases.EXPERTS,
    )
    parts: list[str] = []
    for title, names in cases.GROUPS.items():
        lines = [_line(name, _of(rows, name)) for name in names if _of(rows, name)]
        if lines:
            parts.append("\n".join([f"## {title}\n", *HEAD, *lines]) + "\n")
    publish(folder, intro, *parts, NOTES)
    _draw(rows, folder / "divergence.png")


def divergence(row: Row) -> float | None:
    """Over the last tenth of the steps; None for one that no teacher taught."""
    last = [value for _, value in row["curve"][-max(1, len(row["curve"]) // 10) :]]
    return None if last[0] is None else statistics.mean(last)


def _line(name: str, mine: Sequence[Row]) -> str:
    cells = [
        _spread(mine, lambda row: row["bpb"], 3),
        _spread(mine, lambda row: row["bpb"] - row["teacher"], 3),
        _spread(mine, divergence, 3),
        _spread(mine, lambda row: row["acting"], 2),
        _spread(mine, lambda row: row.get("active"), 1),
        _spread(mine, lambda row: row.get("dead"), 2),
        f"{mine[0]['trained'] / 1000:.0f}",
        f"{statistics.median(row['forward'] for row in mine):.2f}",
        f"{statistics.median(row['step_s'] for row in mine):.2f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _of(rows: Sequence[Row], case: str) -> list[Row]:
    return [row for row in rows if row["case"] == case]


def _spread(rows: Sequence[Row], value: Callable[[Row], float | None], digits: int) -> str:
    return spread([found for row in rows if (found := value(row)) is not None], digits)


def _draw(rows: Sequence[Row], path: Path) -> None:
    """Divergence on the way, the mean of the seeds; and where every seed ends, by what acts."""
    import matplotlib.pyplot as plt

    figure, (way, end) = plt.subplots(1, 2, figsize=(12.5, 4.6))
    for place, name in enumerate(cases.CASES):
        mine, color = _of(rows, name), plt.get_cmap("tab20")(place)
        if not mine:
            continue
        end.plot(
            [row["acting"] for row in mine],
            [row["bpb"] - row["teacher"] for row in mine],
            "o",
            color=color,
            label=name,
        )
        if divergence(mine[0]) is None:
            continue
        points = zip(*(row["curve"] for row in mine), strict=True)
        means = [[statistics.mean(each) for each in zip(*point, strict=True)] for point in points]
        way.plot([t / 1000 for t, _ in means], [d for _, d in means], color=color, label=name)
    way.set(xlabel="thousand tokens", ylabel="divergence from the teacher, nats", yscale="log")
    end.set(
        xlabel="share of feed-forward parameters that act", ylabel="bits per byte above teacher"
    )
    for axis in (way, end):
        axis.grid(alpha=0.3)
    end.legend(fontsize=7)
    save(figure, path)

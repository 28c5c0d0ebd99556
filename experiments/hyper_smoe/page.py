"""Writes README.md with a table for each question, and a picture, from results.json."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.hyper_smoe import cases
from experiments.pages import mean_and_std, save_figure, write_page

Record = dict[str, Any]

INTRO = """# Hyper-SMoE: sparse students on a frozen skeleton

The skeleton is all of a dense teacher except its feed-forwards. The teacher of each seed reaches
{teacher:.3f} bits per byte. Every student trains for {steps:,} steps on the same tokens. All
students except those "from nothing" use the teacher's frozen skeleton and train their feed-forwards
by distillation. "Longer" adds the teacher's number of steps, so that the earlier training of the
skeleton is counted too. The tables have mean and standard deviation over {seeds} seeds. The script
`python -m experiments.hyper_smoe.run` made them, and its docstring describes the measurements.
Nothing was tuned.

- **bits per byte** of held-out modules, lower is better; **gap**: difference to the teacher;
- **divergence** from the teacher in nats per token, on text that the student has not seen before;
- **acting**: parameters of the feed-forwards that are active for a token at the end, without the
  router, relative to the teacher's feed-forwards; **active**: active experts of {experts};
  **dead**: share of experts without a token;
- **trained**: trainable parameters in thousands;
- **forward**: time of a forward pass relative to the teacher; **step**: seconds of a training step,
  with the teacher's forward pass in distillation. Both are medians over seeds.
"""
HEAD = (
    "| case | bits per byte | gap | divergence | acting | active | dead | trained | forward "
    "| step |",
    "|---|---|---|---|---|---|---|---|---|---|",
)
NOTES = """
![Divergence](divergence.png)
"""


def write(records: Sequence[Record], folder: Path) -> None:
    """Write README.md and its picture."""
    if not records:
        return
    teachers = {record["seed"]: record["teacher"] for record in records}
    intro = INTRO.format(
        teacher=statistics.mean(teachers.values()),
        steps=min(record["steps"] for record in records),
        seeds=len(teachers),
        experts=cases.EXPERTS,
    )
    parts: list[str] = []
    for title, names in cases.GROUPS.items():
        lines = [_line(name, _of(records, name)) for name in names if _of(records, name)]
        if lines:
            parts.append("\n".join([f"## {title}\n", *HEAD, *lines]) + "\n")
    write_page(folder, intro, *parts, NOTES)
    _draw(records, folder / "divergence.png")


def divergence(record: Record) -> float | None:
    """Return the mean divergence of the last tenth of the steps; None without a teacher."""
    last = [value for _, value in record["curve"][-max(1, len(record["curve"]) // 10) :]]
    return None if last[0] is None else statistics.mean(last)


def _line(name: str, records: Sequence[Record]) -> str:
    cells = [
        _spread(records, lambda record: record["bpb"], 3),
        _spread(records, lambda record: record["bpb"] - record["teacher"], 3),
        _spread(records, divergence, 3),
        _spread(records, lambda record: record["acting"], 2),
        _spread(records, lambda record: record.get("active"), 1),
        _spread(records, lambda record: record.get("dead"), 2),
        f"{records[0]['trained'] / 1000:.0f}",
        f"{statistics.median(record['forward'] for record in records):.2f}",
        f"{statistics.median(record['step_s'] for record in records):.2f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _of(records: Sequence[Record], case: str) -> list[Record]:
    return [record for record in records if record["case"] == case]


def _spread(records: Sequence[Record], value: Callable[[Record], float | None], digits: int) -> str:
    return mean_and_std([each for record in records if (each := value(record)) is not None], digits)


def _draw(records: Sequence[Record], path: Path) -> None:
    """Draw the mean divergence by tokens, and the final gap of every seed by active parameters."""
    import matplotlib.pyplot as plt

    figure, (progress, end) = plt.subplots(1, 2, figsize=(12.5, 4.6))
    for index, name in enumerate(cases.CASES):
        of_case, color = _of(records, name), plt.get_cmap("tab20")(index)
        if not of_case:
            continue
        end.plot(
            [record["acting"] for record in of_case],
            [record["bpb"] - record["teacher"] for record in of_case],
            "o",
            color=color,
            label=name,
        )
        if divergence(of_case[0]) is None:
            continue
        points = zip(*(record["curve"] for record in of_case), strict=True)
        means = [[statistics.mean(each) for each in zip(*point, strict=True)] for point in points]
        progress.plot([t / 1000 for t, _ in means], [d for _, d in means], color=color, label=name)
    progress.set(xlabel="thousand tokens", ylabel="divergence from the teacher, nats", yscale="log")
    end.set(
        xlabel="share of feed-forward parameters that act", ylabel="bits per byte above teacher"
    )
    for axis in (progress, end):
        axis.grid(alpha=0.3)
    end.legend(fontsize=7)
    save_figure(figure, path)

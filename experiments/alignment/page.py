"""results.json as one page: README.md with a table, and a picture."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.alignment import cases
from experiments.pages import publish, save, spread

Row = dict[str, Any]

INTRO = """# Ways of alignment, compared

All begin with one SFT model of each seed. It was taught additions of one digit by answers of which
45 in 100 are right and the others one too high, so it knows them and does not know which to say:
its greedy answers to {held} that were held back are right in {before:.0f} of 100. All go on for
{rollouts} rollouts of {answers} answers, rewarded where they are right; mean and standard deviation
over {seeds} seeds. Made by `python -m experiments.alignment.run`, which says what is measured and
how; nothing here is chosen: hyper-parameters are those of `recipes/tiny`.

- **accuracy** of greedy answers to the held-back sums, in per cent; **gain** over the SFT model;
- **KL** from the SFT model, nats of an answer: k3 on answers that the model sampled itself;
- **tokens** of answers, in thousands: generated, or, of `dpo` (right answers against those one too
  high, both counted) and `sft` (right answers alone, training simply goes on), trained on;
- **seconds** of all steps, rollouts included: a hint only, where other work shares the machine, as
  their spread tells; **memory**: MiB by which training raised the peak of
  resident memory of a process of its own (`VmHWM`, where there is no `/proc`, `ru_maxrss`); the
  model has 0.1M parameters, so most of it is the same for all.
"""
HEAD = (
    "| case | accuracy | gain | KL | tokens | seconds | memory |",
    "|---|---|---|---|---|---|---|",
)
NOTES = """
`dapo` and `cispo` have the same gradient where a rollout is passed over once, as here: their ratio
is 1.

![Accuracy](accuracy.png)
"""


def write(rows: Sequence[Row], folder: Path) -> None:
    """README.md and its picture."""
    if not rows:
        return
    starts = {row["seed"]: 100 * row["before"] for row in rows}
    intro = INTRO.format(
        before=statistics.mean(starts.values()),
        held=cases.HELD_BACK,
        rollouts=rows[0]["rollouts"],
        answers=cases.ANSWERS,
        seeds=len(starts),
    )
    first = f"| SFT alone | {spread(list(starts.values()), 1)} | | 0 | | | |"
    lines = [
        *HEAD,
        first,
        *(_line(name, _of(rows, name)) for name in cases.CASES if _of(rows, name)),
    ]
    publish(folder, intro, "\n".join(lines), NOTES)
    _draw(rows, folder / "accuracy.png")


def _line(name: str, mine: Sequence[Row]) -> str:
    def cell(value: Callable[[Row], float], digits: int) -> str:
        return spread([value(row) for row in mine], digits)

    cells = [
        cell(lambda row: 100 * row["accuracy"], 1),
        cell(lambda row: 100 * (row["accuracy"] - row["before"]), 1),
        cell(lambda row: row["kl"], 2),
        cell(lambda row: row["tokens"] / 1000, 1),
        cell(lambda row: row["seconds"], 1),
        cell(lambda row: row["mib"], 0),
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _of(rows: Sequence[Row], case: str) -> list[Row]:
    return [row for row in rows if row["case"] == case]


def _draw(rows: Sequence[Row], path: Path) -> None:
    """Accuracy on the way, every case the mean of its seeds, and at what distance it ends."""
    import matplotlib.pyplot as plt

    figure, (way, end) = plt.subplots(1, 2, figsize=(12, 4.4), sharey=True)
    for place, name in enumerate(cases.CASES):
        mine, color = _of(rows, name), f"C{place}"
        if not mine:
            continue
        points = zip(*(row["curve"] for row in mine), strict=True)
        means = [[statistics.mean(each) for each in zip(*point, strict=True)] for point in points]
        style = "o--" if name in cases.OFFLINE else "o-"
        way.plot(
            [tokens / 1000 for tokens, _ in means],
            [100 * accuracy for _, accuracy in means],
            style,
            color=color,
            label=name,
            markersize=4,
        )
        end.plot([row["kl"] for row in mine], [100 * row["accuracy"] for row in mine], "o", c=color)
    way.set(xlabel="thousand tokens of answers (dashed: of the data)", ylabel="greedy, % right")
    end.set(xlabel="KL from the SFT model, nats of an answer (k3), every seed")
    for axis in (way, end):
        axis.grid(alpha=0.3)
    way.legend(fontsize=8)
    save(figure, path)

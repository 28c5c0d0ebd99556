"""Writes README.md with a table, and a picture, from results.json."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.alignment import cases
from experiments.pages import mean_and_std, save_figure, write_page

Record = dict[str, Any]

INTRO = """# A comparison of alignment methods

All runs of a seed start from one SFT model. Its training data are additions of one digit, of which
45 % have the right answer and the others an answer one too high, so that the model knows the sums
but often gives wrong answers: {before:.0f} of its greedy completions of {held} held-out sums are
right. Each run then trains for {rollouts} rollouts of {answers} completions, with a reward for
right answers. The table has mean and standard deviation over {seeds} seeds. The script
`python -m experiments.alignment.run` made it, and its docstring describes the measurements. The
hyper-parameters are those of `recipes/tiny`, without further tuning.

- **accuracy**: per cent of right greedy completions of the held-out sums; **gain**: difference to
  the SFT model;
- **KL** from the SFT model in nats per completion: estimator k3 on completions that the trained
  model sampled;
- **tokens** of completions in thousands, generated or, for `dpo` and `sft`, trained on. `dpo`
  trains on pairs of the right answer and an answer one too high, and both count; `sft` trains on
  right answers only;
- **seconds** of all steps, rollouts included: a rough value, since other programs used the machine,
  as the standard deviations show;
- **memory**: MiB by which training raised the peak resident memory of its process (`VmHWM`, or
  `ru_maxrss` where there is no `/proc`). The model has 0.1M parameters, so most of this memory is
  the same for all.
"""
HEAD = (
    "| case | accuracy | gain | KL | tokens | seconds | memory |",
    "|---|---|---|---|---|---|---|",
)
NOTES = """
`dapo` and `cispo` have the same gradient here, because each rollout is used for one step, in which
the ratio is 1.

![Accuracy](accuracy.png)
"""


def write(records: Sequence[Record], folder: Path) -> None:
    """Write README.md and its picture."""
    if not records:
        return
    starts = {record["seed"]: 100 * record["before"] for record in records}
    intro = INTRO.format(
        before=statistics.mean(starts.values()),
        held=cases.HELD_OUT,
        rollouts=records[0]["rollouts"],
        answers=cases.COMPLETIONS,
        seeds=len(starts),
    )
    first = f"| SFT model | {mean_and_std(list(starts.values()), 1)} | | 0 | | | |"
    lines = [
        *HEAD,
        first,
        *(_line(name, _of(records, name)) for name in cases.CASES if _of(records, name)),
    ]
    write_page(folder, intro, "\n".join(lines), NOTES)
    _draw(records, folder / "accuracy.png")


def _line(name: str, records: Sequence[Record]) -> str:
    def cell(value: Callable[[Record], float], digits: int) -> str:
        return mean_and_std([value(record) for record in records], digits)

    cells = [
        cell(lambda record: 100 * record["accuracy"], 1),
        cell(lambda record: 100 * (record["accuracy"] - record["before"]), 1),
        cell(lambda record: record["kl"], 2),
        cell(lambda record: record["tokens"] / 1000, 1),
        cell(lambda record: record["seconds"], 1),
        cell(lambda record: record["mib"], 0),
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _of(records: Sequence[Record], case: str) -> list[Record]:
    return [record for record in records if record["case"] == case]


def _draw(records: Sequence[Record], path: Path) -> None:
    """Draw mean accuracy by tokens of every case, and final accuracy by KL of every seed."""
    import matplotlib.pyplot as plt

    figure, (progress, end) = plt.subplots(1, 2, figsize=(12, 4.4), sharey=True)
    for index, name in enumerate(cases.CASES):
        of_case, color = _of(records, name), f"C{index}"
        if not of_case:
            continue
        points = zip(*(record["curve"] for record in of_case), strict=True)
        means = [[statistics.mean(each) for each in zip(*point, strict=True)] for point in points]
        style = "o--" if name in cases.OFFLINE else "o-"
        progress.plot(
            [tokens / 1000 for tokens, _ in means],
            [100 * accuracy for _, accuracy in means],
            style,
            color=color,
            label=name,
            markersize=4,
        )
        end.plot(
            [record["kl"] for record in of_case],
            [100 * record["accuracy"] for record in of_case],
            "o",
            c=color,
        )
    progress.set(
        xlabel="thousand tokens of answers (dashed: of the data)", ylabel="greedy, % right"
    )
    end.set(xlabel="KL from the SFT model, nats of an answer (k3), every seed")
    for axis in (progress, end):
        axis.grid(alpha=0.3)
    progress.legend(fontsize=8)
    save_figure(figure, path)

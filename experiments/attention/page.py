"""Writes README.md with a table, and three pictures, from results.json."""

import json
import statistics
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from experiments.attention import cases
from experiments.pages import mean_and_std, save_figure, write_page

Record = dict[str, Any]

INTRO = """# A comparison of mixers and residual connections

Every mixer is combined with every residual connection. All models have about {parameters:,}
parameters and train on the same number of tokens. The table has mean and standard deviation over
{seeds} seeds. The script `python -m experiments.attention.run` made it, and its docstring describes
the measurements. Nothing was tuned.

- **bits per byte** on held-out text, lower is better;
- **needle**: share of single values recalled, mean over lengths 64 to 256 and depths 0 to 1, by
  separate small models that were trained on sequences of 4 to 128 tokens;
- **8 pairs**: accuracy in multi-query associative recall with 8 pairs;
- **step**: time of a training step relative to `dense` with `plain`, all cases measured in turns
  (`--speed`);
- **cache**: bytes of the KV cache of one sequence of 1,024 tokens.
"""
NOTES = """
![Bits per byte](bpb.png)

![Recall of a needle by depth and length](needle.png)

![Recall of several pairs](pairs.png)
"""


def write(records: Sequence[Record], folder: Path) -> None:
    """Write README.md and its pictures."""
    timed = folder / "speed.json"
    speed = json.loads(timed.read_text(encoding="utf-8")) if timed.exists() else {}
    lines = [
        "| mixer | residual | bits per byte | needle | 8 pairs | step | cache |",
        "|---|---|---|---|---|---|---|",
    ]
    for mixer, residual in product(cases.MIXERS, cases.RESIDUALS):
        of_case = _of(records, mixer, residual)
        if not of_case:
            continue
        cells = [
            mean_and_std([record["bpb"] for record in of_case], 3),
            mean_and_std([_needle(record) for record in of_case], 2),
            mean_and_std([record["recall"]["pairs"]["8"] for record in of_case], 2),
            f"{speed[f'{mixer} {residual}'] / speed['dense plain']:.1f}" if speed else "",
            f"{of_case[0]['cache_bytes']:,}",
        ]
        lines.append(f"| {mixer} | {residual} | {' | '.join(cells)} |")
    seeds = len({record["seed"] for record in records})
    intro = INTRO.format(parameters=records[0]["parameters"], seeds=seeds)
    write_page(folder, intro, "\n".join(lines), NOTES)
    _draw_bits(records, folder / "bpb.png")
    _draw_needles(records, folder / "needle.png")
    _draw_pairs(records, folder / "pairs.png")


def _of(records: Sequence[Record], mixer: str, residual: str) -> list[Record]:
    return [
        record for record in records if (record["mixer"], record["residual"]) == (mixer, residual)
    ]


def _needle(record: Record) -> float:
    return statistics.mean(record["recall"]["needle"].values())


def _mean(records: Sequence[Record], value: Callable[[Record], float]) -> float:
    return statistics.mean(map(value, records)) if records else 0.0


def _draw_bits(records: Sequence[Record], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4))
    for offset, residual in enumerate(cases.RESIDUALS):
        for index, mixer in enumerate(cases.MIXERS):
            values = [record["bpb"] for record in _of(records, mixer, residual)]
            color, x = f"C{offset}", index + (offset - 1) * 0.2
            axis.plot(
                [x] * len(values), values, "o", color=color, label=residual if not index else ""
            )
    axis.set_xticks(range(len(cases.MIXERS)), cases.MIXERS)
    axis.set(ylabel="bits per byte, every seed")
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)


def _draw_needles(records: Sequence[Record], path: Path) -> None:
    import matplotlib.pyplot as plt

    lengths = sorted({int(key.split()[0]) for key in records[0]["recall"]["needle"]})
    depths = sorted({float(key.split()[1]) for key in records[0]["recall"]["needle"]})
    figure, axes = plt.subplots(1, len(lengths), figsize=(12, 3.6), sharey=True)
    for axis, length in zip(axes, lengths, strict=True):
        for mixer in cases.MIXERS:
            of_mixer = [record for record in records if record["mixer"] == mixer]
            recalled = [
                _mean(
                    of_mixer,
                    lambda record, key=f"{length} {depth}": record["recall"]["needle"][key],
                )
                for depth in depths
            ]
            axis.plot(depths, recalled, "o-", label=mixer)
        axis.set(title=f"{length} tokens", xlabel="depth of the needle", ylim=(-0.05, 1.05))
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="recalled, all residuals and seeds")
    axes[0].legend()
    save_figure(figure, path)


def _draw_pairs(records: Sequence[Record], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(cases.RESIDUALS), figsize=(12, 3.6), sharey=True)
    for axis, residual in zip(axes, cases.RESIDUALS, strict=True):
        for mixer in cases.MIXERS:
            of_case = _of(records, mixer, residual)
            if not of_case:
                continue
            counts = sorted(map(int, of_case[0]["recall"]["pairs"]))
            recalled = [
                _mean(of_case, lambda record, key=str(count): record["recall"]["pairs"][key])
                for count in counts
            ]
            axis.plot(counts, recalled, "o-", label=mixer)
        axis.set(title=residual, xlabel="pairs among 128 tokens", ylim=(-0.05, 1.05))
        axis.set_xticks(counts)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="recalled")
    axes[0].legend()
    save_figure(figure, path)

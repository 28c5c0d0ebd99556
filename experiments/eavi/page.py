"""Writes README.md with tables, and a picture, from results.json."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.eavi import cases
from experiments.pages import mean_and_std, save_figure, write_page

Record = dict[str, Any]

WAYS = ("start", "teacher", "teacher, longer", "soft", "hard")
INTRO = """# A comparison of EAVI and teacher forcing

The data are puzzles of generated rules on grids of {size} x {size}, with {shown} demonstrations
each. Stage one trains by teacher forcing on {start} tasks, some of them repeated, of the rules
{rules}. Stage two continues at a constant learning rate: `teacher` for {tasks} more tasks,
`soft` and `hard` (EAVI, lambda 0.5, with soft and hard excursions) for as many tasks, and
`teacher, longer` for the time that `soft` took. The table has mean and standard deviation over
{seeds} seeds, on one thread. The script `python -m experiments.eavi.run` made it.

- **seen**: per cent of exact matches, with two attempts by AugScore, on {seen_tasks} new tasks of
  the rules above;
- **held out**: the same on {held_tasks} tasks of the rules
  {held},
  on which no run trains and which no training rule explains;
- **teacher** and **align**: losses in nats per token of the true outputs to tasks of seen rules,
  after true prefixes and after prefixes that the model generated (soft). The measure is the same
  for all runs. All outputs have the shape of their input, so `align_equal` would be equal to
  `align`;
- **tasks** of the stage, and its **seconds**, excursions included.

`minutes` is native sparse attention with dynamic experts, `topk` the same attention with a top-k
router, and `dense` full attention without experts. The active feed-forwards of a token have the
same width in all of them.
"""
HEAD = (
    "| model | stage two | seen | held out | teacher | align | tasks | seconds |",
    "|---|---|---|---|---|---|---|---|",
)
PAIRED = """
Differences between `soft` or `hard` and the teacher-forced run of the same model and seed, over all
models and seeds. Models and seeds differ far more than the methods of stage two.
"""
COMPARED = (("seen", 100, 1), ("held", 100, 1), ("teacher.seen", 1, 3), ("align.seen", 1, 3))
"""Key, unit, digits."""
PAIRED_HEAD = (
    "| difference | seen | held out | teacher | align |",
    "|---|---|---|---|---|",
)
MATCH = """
![Exact match](match.png)
"""
TEXTS = """
Outputs of `minutes` after stage two with soft excursions (seed 0):

![Puzzles](arc_agi.png)
"""


def write(records: Sequence[Record], folder: Path) -> None:
    """Write README.md and its picture."""
    if not records:
        return
    starts, others = _of(records, way="start"), _of(records, way="soft")
    intro = INTRO.format(
        size=cases.SIZES.largest,
        shown=cases.SIZES.demonstrations,
        start=f"{starts[0]['tasks']:,}",
        tasks=f"{others[0]['tasks']:,}",
        rules=", ".join(cases.RULES),
        held=",\n  ".join(cases.HELD),
        seeds=len({record["seed"] for record in records}),
        seen_tasks=cases.SEEN_TASKS,
        held_tasks=cases.HELD_TASKS,
    )
    table = [
        _line(model, way, _of(records, model=model, way=way))
        for model in cases.MODELS
        for way in WAYS
        if _of(records, model=model, way=way)
    ]
    pairs = [_difference(records, way, other) for other in WAYS[1:3] for way in WAYS[3:]]
    texts = [TEXTS] if (folder / "arc_agi.png").exists() else []
    paired = [PAIRED, "\n".join([*PAIRED_HEAD, *pairs])]
    write_page(folder, intro, "\n".join([*HEAD, *table]), *paired, MATCH, *texts)
    _draw(records, folder / "match.png")


def _line(model: str, way: str, records: Sequence[Record]) -> str:
    cells = [
        mean_and_std([100 * record["seen"] for record in records], 1),
        mean_and_std([100 * record["held"] for record in records], 1),
        mean_and_std([record["teacher.seen"] for record in records], 3),
        mean_and_std([record["align.seen"] for record in records], 3),
        f"{statistics.mean(record['tasks'] for record in records):,.0f}",
        mean_and_std([record["seconds"] for record in records], 1),
    ]
    return f"| {model} | {way} | {' | '.join(cells)} |"


def _difference(records: Sequence[Record], way: str, other: str) -> str:
    """Return a table row of the differences between runs of the same model and seed."""
    starts = [(record["model"], record["seed"]) for record in _of(records, way=way)]
    pairs = [
        [
            next(record for record in _of(records, model=model, way=name) if record["seed"] == seed)
            for name in (way, other)
        ]
        for model, seed in starts
    ]
    cells = [
        mean_and_std([unit * (first[key] - second[key]) for first, second in pairs], digits)
        for key, unit, digits in COMPARED
    ]
    return f"| {way} - {other} | {' | '.join(cells)} |"


def _of(records: Sequence[Record], **values: str) -> list[Record]:
    return [
        record for record in records if all(record[key] == value for key, value in values.items())
    ]


def _draw(records: Sequence[Record], path: Path) -> None:
    """Draw exact match of every model and method: means as bars, seeds as points."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True)
    width = 0.8 / len(WAYS)
    for axes, (key, title) in zip(
        panels, (("seen", "new tasks of seen rules"), ("held", "rules held back")), strict=True
    ):
        for index, way in enumerate(WAYS):
            color = f"C{index}"
            axes.plot([], [], "s", color=color, alpha=0.5, label=way)
            for model_index, model in enumerate(cases.MODELS):
                scores = [100 * record[key] for record in _of(records, model=model, way=way)]
                if not scores:
                    continue
                position = model_index + (index - (len(WAYS) - 1) / 2) * width
                axes.bar(position, statistics.mean(scores), 0.9 * width, color=color, alpha=0.5)
                axes.plot([position] * len(scores), scores, "o", color=color, markersize=4)
        axes.set(title=title, ylim=(0, 100), xticks=range(len(cases.MODELS)))
        axes.set_xticklabels(list(cases.MODELS))
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("exact match, % of test outputs")
    panels[0].legend(fontsize=8, ncol=3, loc="upper left")
    save_figure(figure, path)

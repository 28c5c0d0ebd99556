"""results.json as one page: README.md with a table, and a picture."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.eavi import cases
from experiments.pages import publish, save, spread

Row = dict[str, Any]

WAYS = ("start", "teacher", "teacher, longer", "soft", "hard")
INTRO = """# EAVI and teacher forcing, compared

Puzzles of generated rules on grids of {size} x {size}, {shown} demonstrations each. Stage one
shows {start} tasks of the rules {rules}, some of them twice, by teacher forcing.
Stage two goes on at a constant rate: `teacher` for {tasks} more tasks, `soft` and `hard` (EAVI,
lambda 0.5, with soft and with hard excursions) for as many, and `teacher, longer` for as long as
`soft` took. Mean and standard deviation over {seeds} seeds, one thread. Made by
`python -m experiments.eavi.run`.

- **seen**: exact match, two attempts by AugScore, of {seen_tasks} new tasks of those rules, in per
  cent; **held back**: of {held_tasks} tasks of the rules
  {held},
  which no run is taught and no rule that was taught explains;
- **teacher** and **align**: nats of a token of true answers to the tasks of seen rules, after the
  truth's beginnings and after the model's own (soft), by the same measure for all; all answers
  have the shape of their input, so there is no `align_equal` beside it;
- **tasks** of the stage, and its **seconds**, excursions included.

`minutes` is native sparse attention with dynamic experts, `topk` the same attention with a plain
top-k gate, `dense` full attention without experts; a token meets feed-forwards of one width.
"""
HEAD = (
    "| model | way | seen | held back | teacher | align | tasks | seconds |",
    "|---|---|---|---|---|---|---|---|",
)
PAIRED = """
The same by pairs, over all models and seeds: how much more of it `soft` and `hard` have than the
run of the same model and seed that went on by teacher forcing. Models and seeds differ by far more
than ways do.
"""
COMPARED = (("seen", 100, 1), ("held", 100, 1), ("teacher.seen", 1, 3), ("align.seen", 1, 3))
"""Key, unit, digits."""
PAIRED_HEAD = (
    "| way less way | seen | held back | teacher | align |",
    "|---|---|---|---|---|",
)
MATCH = """
![Exact match](match.png)
"""
TEXTS = """
What `minutes` says after soft excursions (seed 0):

![Puzzles](arc_agi.png)
"""


def write(rows: Sequence[Row], folder: Path) -> None:
    """README.md and its picture."""
    if not rows:
        return
    starts, others = _of(rows, way="start"), _of(rows, way="soft")
    intro = INTRO.format(
        size=cases.SIZES.largest,
        shown=cases.SIZES.demonstrations,
        start=f"{starts[0]['tasks']:,}",
        tasks=f"{others[0]['tasks']:,}",
        rules=", ".join(cases.RULES),
        held=",\n  ".join(cases.HELD),
        seeds=len({row["seed"] for row in rows}),
        seen_tasks=cases.SEEN_TASKS,
        held_tasks=cases.HELD_TASKS,
    )
    table = [
        _line(model, way, _of(rows, model=model, way=way))
        for model in cases.MODELS
        for way in WAYS
        if _of(rows, model=model, way=way)
    ]
    pairs = [_difference(rows, way, other) for other in WAYS[1:3] for way in WAYS[3:]]
    output = [TEXTS] if (folder / "arc_agi.png").exists() else []
    paired = [PAIRED, "\n".join([*PAIRED_HEAD, *pairs])]
    publish(folder, intro, "\n".join([*HEAD, *table]), *paired, MATCH, *output)
    _draw(rows, folder / "match.png")


def _line(model: str, way: str, mine: Sequence[Row]) -> str:
    cells = [
        spread([100 * row["seen"] for row in mine], 1),
        spread([100 * row["held"] for row in mine], 1),
        spread([row["teacher.seen"] for row in mine], 3),
        spread([row["align.seen"] for row in mine], 3),
        f"{statistics.mean(row['tasks'] for row in mine):,.0f}",
        spread([row["seconds"] for row in mine], 1),
    ]
    return f"| {model} | {way} | {' | '.join(cells)} |"


def _difference(rows: Sequence[Row], way: str, other: str) -> str:
    """What `way` has more than `other`, each beside the one that began with the same model."""
    begun = [(row["model"], row["seed"]) for row in _of(rows, way=way)]
    both = [
        [
            next(row for row in _of(rows, model=model, way=name) if row["seed"] == seed)
            for name in (way, other)
        ]
        for model, seed in begun
    ]
    cells = [
        spread([unit * (mine[key] - theirs[key]) for mine, theirs in both], digits)
        for key, unit, digits in COMPARED
    ]
    return f"| {way} less {other} | {' | '.join(cells)} |"


def _of(rows: Sequence[Row], **wanted: str) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _draw(rows: Sequence[Row], path: Path) -> None:
    """Exact match of every model and way: means as bars, seeds as points."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True)
    width = 0.8 / len(WAYS)
    for axes, (key, title) in zip(
        panels, (("seen", "new tasks of seen rules"), ("held", "rules held back")), strict=True
    ):
        for place, way in enumerate(WAYS):
            color = f"C{place}"
            axes.plot([], [], "s", color=color, alpha=0.5, label=way)
            for number, model in enumerate(cases.MODELS):
                found = [100 * row[key] for row in _of(rows, model=model, way=way)]
                if not found:
                    continue
                at = number + (place - (len(WAYS) - 1) / 2) * width
                axes.bar(at, statistics.mean(found), 0.9 * width, color=color, alpha=0.5)
                axes.plot([at] * len(found), found, "o", color=color, markersize=4)
        axes.set(title=title, ylim=(0, 100), xticks=range(len(cases.MODELS)))
        axes.set_xticklabels(list(cases.MODELS))
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("exact match, % of test outputs")
    panels[0].legend(fontsize=8, ncol=3, loc="upper left")
    save(figure, path)

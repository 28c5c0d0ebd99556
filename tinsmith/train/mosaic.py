"""Puzzles and what became of them, side by side: a demonstration, the input asked about, the true
output, two attempts.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinsmith.data.grids import Grid
from tinsmith.evals.arc import Outcome
from tinsmith.train.canvas import BAD, COLOURS, FAINT, INK, heading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 8
"""Puzzles of a picture: half of them solved, where there are as many."""
TOP, EACH, BOTTOM = 1.0, 1.35, 0.1
"""Inches: the heading, a puzzle, the rest."""
SHADES = (
    *("#16191d", "#1f6feb", "#d1372b", "#2da44e", "#e3b341"),
    *("#8c959f", "#bf3989", "#d1672b", "#79c0ff", "#7d1f2b"),
)
COLUMNS = ("demonstration", "", "input", "output", "attempt 1", "attempt 2")


def chosen(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The first that are right and the first that are not, in equal parts as far as there are."""
    right = [each for each in outcomes if each.right]
    wrong = [each for each in outcomes if not each.right]
    most = max(SHOWN // 2, SHOWN - len(wrong))
    return [*right[:most], *wrong[: SHOWN - min(len(right), most)]]


def draw_puzzles(outcomes: Sequence[Outcome]) -> "Figure":
    """A row of grids for each of some outcomes."""
    from matplotlib.figure import Figure

    shown = chosen(outcomes)
    height = TOP + EACH * len(shown) + BOTTOM
    figure = Figure(figsize=(9.0, height))
    right = sum(each.right for each in outcomes)
    heading(figure, "ARC-AGI", f"{right} of {len(outcomes)} test outputs right, two attempts each")
    grid = figure.add_gridspec(
        *(len(shown), len(COLUMNS)),
        **{"left": 0.17, "right": 0.985, "top": 1 - TOP / height, "bottom": BOTTOM / height},
        **{"wspace": 0.15, "hspace": 0.15},
    )
    for row, outcome in enumerate(shown):
        puzzle = outcome.puzzle
        attempts = [*outcome.attempts, None, None][:2]
        grids = [*puzzle.shown[0], puzzle.asked, puzzle.answer, *attempts]
        for column, each in enumerate(grids):
            axes = figure.add_subplot(grid[row, column])
            _draw(axes, each)
            if row == 0:
                axes.set_title(COLUMNS[column], fontsize=8.5, color=INK)
            if column > 3 and each is not None and each == puzzle.answer:
                _framed(axes)
        place = 1 - (TOP + EACH * (row + 0.5)) / height
        colour = COLOURS[2] if outcome.right else BAD
        name = f"{puzzle.name}\n{'right' if outcome.right else 'wrong'}"
        figure.text(0.015, place, name, fontsize=8, color=colour, va="center")
    return figure


def _draw(axes: "Axes", grid: Grid | None) -> None:
    from matplotlib.colors import ListedColormap

    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_aspect("equal")
    if grid is None:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color=FAINT)
        return
    axes.pcolormesh(
        [list(row) for row in reversed(grid)],
        **{"cmap": ListedColormap(SHADES), "vmin": -0.5, "vmax": 9.5},
        **{"edgecolors": "#57606a", "linewidth": 0.4},
    )


def _framed(axes: "Axes") -> None:
    """A frame around what is right."""
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(COLOURS[2])
        spine.set_linewidth(2)

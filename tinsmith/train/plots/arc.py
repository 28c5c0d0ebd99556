"""Plot grid puzzles: a demonstration, the test input, the true output and two attempts, side by
side.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinsmith.data.arc.grids import Grid
from tinsmith.evals.arc import ArcOutcome
from tinsmith.train.plots.style import BAD, COLOURS, FAINT, INK, draw_heading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PUZZLES = 8
"""Puzzles in a picture. Half of them are solved ones, if there are enough."""
HEADING_INCHES, PUZZLE_INCHES, MARGIN_INCHES = 1.0, 1.35, 0.1
"""Sizes in inches: heading, puzzle, margin."""
CELL_COLOURS = (
    *("#16191d", "#1f6feb", "#d1372b", "#2da44e", "#e3b341"),
    *("#8c959f", "#bf3989", "#d1672b", "#79c0ff", "#7d1f2b"),
)
COLUMN_TITLES = ("demonstration", "", "input", "output", "attempt 1", "attempt 2")


def pick_outcomes(outcomes: Sequence[ArcOutcome]) -> list[ArcOutcome]:
    """Select the first solved and the first unsolved puzzles, as many of both if possible."""
    right = [each for each in outcomes if each.correct]
    wrong = [each for each in outcomes if not each.correct]
    most = max(MAX_PUZZLES // 2, MAX_PUZZLES - len(wrong))
    return [*right[:most], *wrong[: MAX_PUZZLES - min(len(right), most)]]


def draw_puzzles(outcomes: Sequence[ArcOutcome]) -> "Figure":
    """Draw a row of grids for each outcome."""
    from matplotlib.figure import Figure

    shown = pick_outcomes(outcomes)
    height = HEADING_INCHES + PUZZLE_INCHES * len(shown) + MARGIN_INCHES
    figure = Figure(figsize=(9.0, height))
    right = sum(each.correct for each in outcomes)
    draw_heading(
        figure, "ARC-AGI", f"{right} of {len(outcomes)} test outputs right, two attempts each"
    )
    grid = figure.add_gridspec(
        *(len(shown), len(COLUMN_TITLES)),
        **{
            "left": 0.17,
            "right": 0.985,
            "top": 1 - HEADING_INCHES / height,
            "bottom": MARGIN_INCHES / height,
        },
        **{"wspace": 0.15, "hspace": 0.15},
    )
    for row, outcome in enumerate(shown):
        puzzle = outcome.puzzle
        attempts = [*outcome.attempts, None, None][:2]
        grids = [*puzzle.demonstrations[0], puzzle.test_input, puzzle.answer, *attempts]
        for column, each in enumerate(grids):
            axes = figure.add_subplot(grid[row, column])
            _draw(axes, each)
            if row == 0:
                axes.set_title(COLUMN_TITLES[column], fontsize=8.5, color=INK)
            if column > 3 and each is not None and each == puzzle.answer:
                _framed(axes)
        place = 1 - (HEADING_INCHES + PUZZLE_INCHES * (row + 0.5)) / height
        colour = COLOURS[2] if outcome.correct else BAD
        name = f"{puzzle.name}\n{'right' if outcome.correct else 'wrong'}"
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
        **{"cmap": ListedColormap(CELL_COLOURS), "vmin": -0.5, "vmax": 9.5},
        **{"edgecolors": "#57606a", "linewidth": 0.4},
    )


def _framed(axes: "Axes") -> None:
    """Draw a frame around a correct attempt."""
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(COLOURS[2])
        spine.set_linewidth(2)

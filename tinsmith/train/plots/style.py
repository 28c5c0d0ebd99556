"""Shared style of all plots. Equal metrics give equal bytes: no dates, no random ids, and fonts and
style that do not depend on the user's settings.
"""

import io
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tinsmith.train.plots.history import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#24292f", "#8c959f"
TRAIN, VALIDATION, RATE, NORM, BAD = "#1f6feb", "#d1572b", "#8250df", "#57606a", "#cf222e"
COLOURS = ("#1f6feb", "#d1572b", "#2da44e", "#8250df", "#bf8700", "#0a7f8c", "#bf3989", "#57606a")
METADATA = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#d0d7de",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eaeef2",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": NORM,
    "ytick.labelcolor": NORM,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "legend.frameon": False,
    "svg.hashsalt": "tinsmith",
    "svg.fonttype": "path",
    "savefig.dpi": 160,
}


def draw_heading(figure: "Figure", title: str, summary: str) -> None:
    """Write title and subtitle at the top left of a figure."""
    height = figure.get_figheight()
    figure.text(0.015, 1 - 0.25 / height, title, size=15, weight="bold", va="center")
    figure.text(0.0155, 1 - 0.53 / height, summary, size=9.5, color=NORM, va="center")


def set_title(axes: "Axes", title: str, unit: str) -> None:
    """Write the title of a panel and the unit of its vertical axis."""
    axes.set_title(title, loc="left")
    axes.set_ylabel(unit, fontsize=8.5, color=NORM)


def format_step_axis(axes: "Axes", last: int) -> None:
    """Format the horizontal axis: whole steps from 0."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlim(0, 1.015 * max(last, 1))
    axes.set_xlabel("step", fontsize=8.5, color=NORM)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(length=0, labelsize=8.5)


def draw_placeholder(axes: "Axes", text: str) -> None:
    """Write a text in place of an empty plot."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=FAINT)
    axes.set_yticks([])


def point_marker(series: Series) -> str:
    """Return a marker for a line of a single point, which would be invisible."""
    return "o" if len(series) == 1 else ""


def render_figures(draw: Callable[[], "Figure"], kinds: Sequence[str]) -> dict[str, bytes]:
    """Render what `draw` makes as a file of each of `kinds` (png, svg)."""
    from matplotlib import style

    with style.context(["default", STYLE]):
        figure = draw()
        return {kind: _file(figure, kind) for kind in kinds}


def _file(figure: "Figure", kind: str) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format=kind, metadata=METADATA[kind])
    return buffer.getvalue()

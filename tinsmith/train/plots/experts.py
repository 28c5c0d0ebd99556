"""Plot statistics of experts over a run: a heat map of loads for every routed layer, and curves of
active experts, dead experts and router entropy; also of thresholds, biases and surprise if the run
logged them.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tinsmith.train.plots.history import History
from tinsmith.train.plots.style import (
    BAD,
    COLOURS,
    FAINT,
    draw_heading,
    draw_placeholder,
    format_step_axis,
    point_marker,
    set_title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

MAX_LOG2_LOAD = 3
"""Colours show log2 of the load over the mean load, from -3 to 3."""
MAX_COLUMNS = 4
CURVES = (
    ("active", "Experts per token", "experts"),
    ("dead", "Experts without a token", "experts"),
    ("entropy", "Entropy of the gates", "nats"),
)
OPTIONAL_CURVES = (
    ("drift", "Drift of the gates", "mean size"),
    ("surprise", "Surprise", "of a token's gradient"),
    ("inactive_fraction", "Tokens in the dark room", "share"),
)


def draw_experts(history: History) -> "Figure":
    """Draw the loads over steps, one panel per layer, and three to six curves."""
    from matplotlib.figure import Figure

    lines = history.of_kind("routing")
    names = list(dict.fromkeys(name for line in lines for name in line["layers"]))
    columns = min(MAX_COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    below = [
        *CURVES,
        *(each for each in OPTIONAL_CURVES if len(history.series("routing", each[0]))),
    ]
    deep = math.ceil(len(below) / MAX_COLUMNS)
    abreast = math.ceil(len(below) / deep)
    maps, curves = 1.35 * rows + 0.45 * (rows - 1), 1.3 * deep + 0.65 * (deep - 1)
    top, bottom = 1.15, 0.5
    height = top + maps + 0.95 + curves + bottom
    figure = Figure(figsize=(10.4, height))
    draw_heading(figure, history.name, _summary(lines))
    side: dict[str, Any] = {"left": 0.06, "right": 0.9}
    over, under = 1 - top / height, 1 - (top + maps) / height
    grid = figure.add_gridspec(rows, columns, top=over, bottom=under, **side)
    grid.update(hspace=0.45 / 1.35, wspace=0.14)
    shown: list[ScalarMappable] = []
    for place, name in enumerate(names):
        axes = figure.add_subplot(grid[place // columns, place % columns])
        shown.append(_draw_layer(axes, name, lines, history.step))
        if place % columns == 0:
            set_title(axes, name, "expert")
        last = place + columns >= len(names)
        axes.set_xlabel("step" if last else "", fontsize=8.5)
        axes.tick_params(labelbottom=last)
    bar = figure.add_axes((0.92, under, 0.012, over - under))
    _legend(figure, bar, shown[0])
    low = figure.add_gridspec(
        deep, abreast, top=(bottom + curves) / height, bottom=bottom / height, **side
    )
    low.update(hspace=0.65 / 1.3, wspace=0.1 * abreast)
    for place, (key, title, unit) in enumerate(below):
        axes = figure.add_subplot(low[place // abreast, place % abreast])
        _draw_curve(axes, history, key, COLOURS[place])
        set_title(axes, title, unit)
        format_step_axis(axes, history.step)
        axes.set_xlabel("step" if place + abreast >= len(below) else "", fontsize=8.5)
    return figure


def _draw_layer(
    axes: "Axes", name: str, lines: list[dict[str, Any]], last: int
) -> "ScalarMappable":
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    edges, ratios = _ratios(name, lines)
    with np.errstate(divide="ignore"):
        values = np.ma.masked_invalid(np.log2(ratios)).clip(-MAX_LOG2_LOAD, MAX_LOG2_LOAD)
    share = np.ma.masked_array(values, ratios == 0)
    drawn = axes.pcolormesh(
        *(edges, np.arange(len(ratios) + 1) - 0.5, share),
        cmap=_colours(),
        norm=Normalize(-MAX_LOG2_LOAD, MAX_LOG2_LOAD),
        rasterized=True,
    )
    axes.set_facecolor(BAD)
    axes.grid(False)
    set_title(axes, name, "")
    format_step_axis(axes, last)
    axes.set_xlim(edges[0], edges[-1])
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    return drawn


def _ratios(
    name: str, lines: list[dict[str, Any]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the edges of the step intervals (n + 1,) and the loads over the mean load (experts,
    n).
    """
    mine = [line for line in lines if name in line["layers"]]
    loads = np.array([line["layers"][name]["load"] for line in mine], dtype=np.float64)
    even = loads.mean(1, keepdims=True)
    ratios = np.divide(loads, even, out=np.zeros_like(loads), where=even > 0)
    steps = [line["step"] for line in mine]
    return np.array([max(0, 2 * steps[0] - steps[1]) if steps[1:] else 0, *steps]), ratios.T


def _colours() -> Any:
    from matplotlib import colormaps

    return colormaps["PuOr_r"]


def _legend(figure: "Figure", place: "Axes", shown: "ScalarMappable") -> None:
    bar = figure.colorbar(shown, cax=place)
    ticks = range(-MAX_LOG2_LOAD, MAX_LOG2_LOAD + 1)
    bar.set_ticks(list(ticks), labels=[f"{2**n}" if n >= 0 else f"1/{2**-n}" for n in ticks])
    bar.set_label("load / even share; red: 0", fontsize=8.5, color=FAINT)
    bar.outline.set_visible(False)  # type: ignore[operator]
    place.tick_params(length=0, labelsize=8)


def _draw_curve(axes: "Axes", history: History, key: str, colour: str) -> None:
    series = history.series("routing", key)
    if not len(series):
        return draw_placeholder(axes, "not told")
    axes.plot(series.steps, series.values, color=colour, linewidth=1.5, marker=point_marker(series))
    axes.set_ylim(0, 1.15 * max(series.values.max(), 1.0 if key == "dead" else 0.1))


def _summary(lines: list[dict[str, Any]]) -> str:
    """Format the last statistics of experts in one line."""
    last = lines[-1]
    layers = f"{len(last['layers'])} routed layers, {last['experts']} experts"
    return f"{layers}   ·   at the end {last['active']:.2f} per token, {last['dead']} without one"

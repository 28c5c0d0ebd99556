"""Plot the loss of a run in four panels, or of several runs in one picture."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tinsmith.core.units import format_count
from tinsmith.train.plots.history import History, Series
from tinsmith.train.plots.style import (
    BAD,
    COLOURS,
    NORM,
    RATE,
    TRAIN,
    VALIDATION,
    draw_heading,
    draw_placeholder,
    format_step_axis,
    point_marker,
    set_title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_run(history: History) -> "Figure":
    """Draw training loss (left), and validation, learning rate and gradient norm (right)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 5.6))
    grid = figure.add_gridspec(
        3, 2, width_ratios=(1.5, 1), height_ratios=(2, 1, 1), left=0.062, right=0.975, top=0.83
    )
    grid.update(bottom=0.09, hspace=0.5, wspace=0.17)
    draw_heading(figure, history.name, _summary(history))
    loss = figure.add_subplot(grid[:, 0])
    panels = [figure.add_subplot(grid[row, 1]) for row in range(3)]
    _draw_loss(loss, history)
    _draw_validation(panels[0], history)
    _draw_rate(panels[1], history.series("train", "lr_multiplier"))
    _draw_norm(panels[2], history.series("train", "grad_norm"))
    for axes in (loss, *panels):
        format_step_axis(axes, history.step)
    for axes in panels[:-1]:
        axes.set_xlabel("")
        axes.tick_params(labelbottom=False)
    return figure


def draw_runs(histories: Sequence[History]) -> "Figure":
    """Draw training loss and validation of several runs, one colour each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 5.0))
    names = _labels(histories)
    rows = -(-len(names) // 4)
    top = 0.92 - 0.05 * rows
    grid = figure.add_gridspec(1, 2, left=0.062, right=0.975, top=top, bottom=0.105, wspace=0.17)
    loss, validation = (figure.add_subplot(grid[0, column]) for column in range(2))
    key, unit = _measure(histories)
    set_title(loss, "Training loss, smoothed", "nats per token")
    set_title(validation, f"Validation {unit}", unit if key == "bpb" else "nats per token")
    ends = []
    for number, (history, name) in enumerate(zip(histories, names, strict=True)):
        look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "label": name}
        look["linestyle"] = ("-", "--", ":")[number // len(COLOURS) % 3]
        train, found = history.series("train", "loss"), history.series("eval", key)
        (line,) = loss.plot(train.steps, train.smooth(), linewidth=1.8, **look)
        validation.plot(found.steps, found.values, marker="o", markersize=3, linewidth=1.5, **look)
        ends.append(line)
    last = max((history.step for history in histories), default=0)
    for axes in (loss, validation):
        format_step_axis(axes, last)
    shape = {"ncols": 4, "borderaxespad": 0.0, "handlelength": 1.6, "columnspacing": 1.6}
    figure.legend(ends, names, loc="upper left", bbox_to_anchor=(0.062, 0.985), **shape)
    return figure


def _draw_loss(axes: "Axes", history: History) -> None:
    set_title(axes, "Loss", "nats per token")
    train, held = history.series("train", "loss"), history.series("eval", "loss")
    if not len(train) and not len(held):
        return draw_placeholder(axes, "no step logged yet")
    smooth = train.smooth()
    if len(train):
        axes.plot(train.steps, train.values, color=TRAIN, alpha=0.28, linewidth=0.9)
        look = {"color": TRAIN, "linewidth": 2.0, "marker": point_marker(train)}
        axes.plot(train.steps, smooth, label="training", **look)
    if len(held):
        look = {"markersize": 4, "linewidth": 1.2, "markeredgecolor": "white"}
        axes.plot(
            held.steps, held.values, "o-", color=VALIDATION, label="validation", zorder=3, **look
        )
    every = [*smooth, *held.values]
    low, high = min(every), max(every)
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    bad = [line["step"] for line in history.of_kind("nonfinite_step")]
    if bad:
        look = {"linestyle": "none", "marker": "|", "markersize": 9, "clip_on": False}
        across = axes.get_xaxis_transform()
        axes.plot(bad, [0.0] * len(bad), color=BAD, transform=across, label="skipped step", **look)
    axes.legend(loc="upper right")


def _draw_validation(axes: "Axes", history: History) -> None:
    key, unit = _measure([history])
    set_title(axes, f"Validation {unit}", unit if key == "bpb" else "nats per token")
    found = history.series("eval", key)
    if not len(found):
        return draw_placeholder(axes, "no evaluation yet")
    names = [name for name in history.keys("eval") if name.startswith("bpb.") and key == "bpb"]
    for number, name in enumerate(names):
        part = history.series("eval", name)
        colour = COLOURS[(number + 2) % len(COLOURS)]
        axes.plot(
            part.steps, part.values, color=colour, linewidth=1, label=name.removeprefix("bpb.")
        )
    label = "all" if names else None
    axes.plot(found.steps, found.values, "o-", color=VALIDATION, markersize=3.5, label=label)
    best = int(found.values.argmin())
    axes.plot(found.steps[best], found.values[best], "o", color=VALIDATION, markersize=7, zorder=3)
    if names:
        axes.legend(loc="upper right", fontsize=8, ncols=2 if len(names) > 2 else 1)


def _draw_rate(axes: "Axes", rate: Series) -> None:
    set_title(axes, "Learning rate, times its peak", "multiplier")
    if not len(rate):
        return draw_placeholder(axes, "no step logged yet")
    axes.fill_between(rate.steps, rate.values, color=RATE, alpha=0.12, linewidth=0)
    axes.plot(rate.steps, rate.values, color=RATE, linewidth=1.5, marker=point_marker(rate))
    axes.set_ylim(0, 1.08 * max(1.0, rate.values.max()))


def _draw_norm(axes: "Axes", norm: Series) -> None:
    set_title(axes, "Gradient norm, before clipping", "L2 norm")
    if not len(norm):
        return draw_placeholder(axes, "no step logged yet")
    axes.plot(norm.steps, norm.values, color=NORM, linewidth=1.1, marker=point_marker(norm))
    usual = sorted(norm.values)[int(0.98 * (len(norm) - 1))]
    axes.set_ylim(0, 1.25 * usual or 1.0)


def _summary(history: History) -> str:
    """Describe the run in one line: its last metrics."""
    parts = []
    tokens, bpb = history.series("train", "tokens"), history.series("eval", "bpb")
    if len(tokens):
        parts.append(f"{history.step:,} steps, {format_count(tokens.values[-1])} tokens")
    if len(bpb):
        best = int(bpb.values.argmin())
        value, step = bpb.values[best], int(bpb.steps[best])
        parts.append(f"best validation {value:.3f} bits per byte at step {step:,}")
    return "   ·   ".join(parts)


def _measure(histories: Sequence[History]) -> tuple[str, str]:
    """Return bits per byte, or the loss if no run has them."""
    if any(len(history.series("eval", "bpb")) for history in histories):
        return "bpb", "bits per byte"
    return "loss", "loss"


def _labels(histories: Sequence[History]) -> list[str]:
    """Return the runs' names, with numbers where two are equal."""
    names = [history.name for history in histories]
    return [
        f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]

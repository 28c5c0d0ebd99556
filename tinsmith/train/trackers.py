"""Send a run's metrics to TensorBoard, wandb or trackio. `metrics.jsonl` has all of them anyway.

Each tracker wraps a library that is imported only if a recipe names it. A tracker never stops
training: its first failure is printed as a warning, and it is not used from then on.
"""

import netrc
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from tinsmith.core import rng
from tinsmith.core.errors import UserError
from tinsmith.core.log import Metrics, RunLog, print_warning
from tinsmith.core.yamlfile import write_yaml
from tinsmith.train.plots.history import is_number

PROJECT = "tinsmith"
WANDB_TIMEOUT = 20
"""Seconds that a run waits for wandb's server, once."""
NOT_INSTALLED = (
    'log.trackers: {name} is not installed; pip install "tinsmith[track]", or leave it out'
)


class Tracker(Protocol):
    """The interface of all trackers."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Log the metrics of one step; keys are `kind/name`."""
        ...

    def close(self) -> None:
        """Flush and end the tracker."""
        ...


class TensorBoard:
    """Event files in `RUN/tensorboard`. A resumed run hides events after its step."""

    def __init__(self, folder: Path, config: dict[str, Any], name: str):
        from torch.utils.tensorboard import SummaryWriter

        self._open = lambda step: SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        self._config = write_yaml(config)
        self._writer: Any = None

    def log(self, values: dict[str, float], step: int) -> None:
        """Write one scalar per metric."""
        if self._writer is None:
            self._writer = self._open(step)
            self._writer.add_text("config", f"```yaml\n{self._config}```", step)
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """A run of the project `tinsmith`: in `RUN/wandb` for `wandb sync`, or online for a user who is
    logged in; WANDB_MODE decides if it is set.
    """

    def __init__(self, folder: Path, config: dict[str, Any], name: str):
        import wandb  # pyright: ignore[reportMissingImports]

        mode = None if "WANDB_MODE" in os.environ else _wandb_mode()
        settings = wandb.Settings(init_timeout=WANDB_TIMEOUT, silent=True, console="off")
        self._run = wandb.init(
            project=PROJECT, name=name, dir=folder, config=config, mode=mode, settings=settings
        )

    def log(self, values: dict[str, float], step: int) -> None:
        """Log the values in one call."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """End wandb's run."""
        self._run.finish()


class Trackio:
    """A run of the project `tinsmith` in trackio's own folder. A resumed run continues it."""

    def __init__(self, folder: Path, config: dict[str, Any], name: str):
        import trackio  # pyright: ignore[reportMissingImports]

        self._run = trackio.init(PROJECT, name=name, config=config, resume="allow", embed=False)
        self._finish = trackio.finish

    def log(self, values: dict[str, float], step: int) -> None:
        """Log the values in one call."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """End trackio's run."""
        self._finish()


TRACKERS: dict[str, Callable[[Path, dict[str, Any], str], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def attach_trackers(
    trackers: tuple[str, ...], folder: Path, config: dict[str, Any], name: str, log: RunLog
) -> Callable[[], None]:
    """Attach the named trackers to all metrics of `log`. Return the function that closes them.

    Neither trackers nor that function raise later. A quiet log (of another rank) gets none. Raise
    UserError if a tracker is not installed.
    """
    open_ones: dict[str, Tracker] = {}
    tensors, values = rng.capture()
    try:
        for one in () if log.quiet else trackers:
            _begin(open_ones, one, folder, config, name)
    finally:
        rng.restore(tensors, values)

    def attach(line: Metrics) -> None:
        kind, step = line["kind"], line["step"]
        numbers = {f"{kind}/{key}": value for key, value in line.items() if is_number(value)}
        del numbers[f"{kind}/step"]
        for one, tracker in list(open_ones.items()) if numbers else ():
            _guarded(open_ones, one, partial(tracker.log, numbers, step))

    def close() -> None:
        for one, tracker in list(open_ones.items()):
            _guarded(open_ones, one, tracker.close)
        open_ones.clear()

    log.listeners.append(attach)
    return close


def _begin(
    open_ones: dict[str, Tracker], one: str, folder: Path, config: dict[str, Any], name: str
) -> None:
    try:
        open_ones[one] = TRACKERS[one](folder, config, name)
    except ImportError:
        raise UserError(NOT_INSTALLED.format(name=one)) from None
    except Exception as error:  # of a server, a disk or a library
        print_warning(f"{one} could not be started: {_line(error)}; training goes on without it")


def _guarded(open_ones: dict[str, Tracker], one: str, action: Callable[[], None]) -> None:
    """Run an action of a tracker. If it fails, warn and remove the tracker."""
    try:
        action()
    except Exception as error:  # of a server, a disk or a library
        del open_ones[one]
        print_warning(f"{one} failed: {_line(error)}; training goes on without it")


def _line(error: Exception) -> str:
    output = str(error).strip().splitlines()
    return f"{type(error).__name__}: {output[0]}" if output else type(error).__name__


def _wandb_mode() -> Literal["online", "offline"]:
    """`online` for a user who is logged in, so that wandb never waits for a password."""
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    try:
        known = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return "offline"
    return "online" if host in known else "offline"

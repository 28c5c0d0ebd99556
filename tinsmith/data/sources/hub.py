"""Data sets of the Hugging Face Hub, through `datasets`: fetched once as a stream of rows, then
read like a file.

Nothing touches the network unless a recipe names a data set, and `HF_HUB_OFFLINE` is honoured. A
local folder that `datasets` can read goes the same way.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tinsmith.core.errors import UserError
from tinsmith.core.progress import Progress
from tinsmith.core.units import format_count
from tinsmith.data import files
from tinsmith.data.config import HubData


def fetch(
    config: HubData, path: Path, say: Callable[[str], None], stop: Callable[[], bool] | None
) -> None:
    """Write the rows of a data set (the first `limit` of them) to `path` as JSON lines.

    UserError where `datasets` is missing, or cannot find or read the data set.
    """
    say(
        f" prepare   fetching {label(config)} through `datasets`"
        + (f", {format_count(config.limit)} rows" if config.limit else "")
    )
    progress = Progress(f"fetching {config.name}", None, say, stop)
    with path.open("w", encoding="utf-8") as file:
        for row in itertools.islice(_stream(config), config.limit):
            line = json.dumps(row, default=str) + "\n"
            file.write(line)
            progress.advance(len(line))


def read_records(config: HubData, path: Path) -> Iterator[files.Record | files.Reject]:
    """The fetched rows; in messages they are rows of the data set, counted from 1."""
    return (row._replace(file=label(config)) for row in files.read_records(path))


def label(config: HubData) -> str:
    """The data set as people write it: name, configuration, split, revision."""
    parts = [config.name, config.config, config.split, config.revision]
    return ":".join(part for part in parts if part)


def _stream(config: HubData) -> Iterator[dict[str, Any]]:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise UserError(
            'data.kind: hub needs the `datasets` package: pip install "tinsmith[hub]"'
        ) from None
    try:
        stream = datasets.load_dataset(
            config.name, config.config, split=config.split, revision=config.revision, streaming=True
        )
        yield from stream
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"data.name: cannot read the data set '{config.name}': {reason}") from None

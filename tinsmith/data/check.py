"""A first look at data, before anything is prepared: is it there, and does its first record
read?
"""

from collections.abc import Sequence
from pathlib import Path

from tinsmith.core.errors import UserError
from tinsmith.data import hub
from tinsmith.data.config import DataConfig, Hub, Shape
from tinsmith.data.files import Reject
from tinsmith.data.streams import open_origin


def check_data(sections: Sequence[DataConfig], shape: Shape) -> list[str]:
    """A line per source; UserError for what is missing or cannot give `shape`. Fetches nothing."""
    lines = []
    for number, section in enumerate(sections):
        key = "data" if len(sections) == 1 else f"data.{number}"
        origin = open_origin(section, shape, key, _refuse)
        if isinstance(section, Hub):
            lines.append(f"{hub.label(section)}: will be fetched by `prepare`")
            continue
        first = next(iter(origin.train()), None)
        if first is None:
            raise UserError(f"{key}: '{origin.name}' holds nothing")
        if isinstance(first, Reject):
            lines.append(f"{origin.name}: {first.file}:{first.line}: {first.reason}")
        else:
            lines.append(f"{origin.name}: the first of its {shape} reads well")
    return lines


def _refuse(config: Hub) -> Path:
    raise AssertionError(f"{config.name} is not fetched for a look")

"""Data sources: where samples come from. The `data:` section of a recipe is one of these configs,
or a list of them, each with its `weight`.
"""

from typing import Annotated, get_args

from tinsmith.core.errors import UserError
from tinsmith.core.parse import Kind
from tinsmith.data.formats import FORMATS, FormatName
from tinsmith.data.sources.arc import ArcData
from tinsmith.data.sources.base import DataSource, SourceConfig, SourceContext
from tinsmith.data.sources.chats import ChatsData
from tinsmith.data.sources.hub import HubData
from tinsmith.data.sources.stdlib import StdlibData
from tinsmith.data.sources.tasks import TasksData
from tinsmith.data.sources.text import TextData

__all__ = [
    "AnySource",
    "ArcData",
    "ChatsData",
    "DataConfig",
    "DataSource",
    "HubData",
    "SourceConfig",
    "SourceContext",
    "StdlibData",
    "TasksData",
    "TextData",
    "open_source",
]

AnySource = StdlibData | TasksData | ArcData | TextData | ChatsData | HubData
DataConfig = Annotated[AnySource, Kind()]


def open_source(
    config: SourceConfig, data_format: FormatName, context: SourceContext
) -> DataSource:
    """Find the data of a source without reading them. UserError if they are not there, or if the
    source cannot give this format.
    """
    if not config.supports(data_format):
        others = [each.kind for each in get_args(AnySource) if each.supports(data_format)]
        raise UserError(
            f"{context.key}.kind: '{config.kind}' has no {data_format}; "
            f"use {', '.join(others[:-1])} or {others[-1]}"
        )
    return config.open(FORMATS[data_format], context)

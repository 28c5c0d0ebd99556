"""Data sets of the Hugging Face Hub, through `datasets`: `kind: hub`.

The records are downloaded once as a stream and then read like a file. Nothing uses the network
unless a recipe names a data set, and `HF_HUB_OFFLINE` is honoured. A local folder that `datasets`
can read works in the same way.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tinsmith.core.errors import UserError
from tinsmith.core.parse import to_plain
from tinsmith.core.progress import Progress
from tinsmith.core.units import format_count
from tinsmith.data import files
from tinsmith.data.documents import Document
from tinsmith.data.files import Reject
from tinsmith.data.formats.base import DataFormat
from tinsmith.data.sources.base import (
    DataSource,
    OnBadLine,
    SourceConfig,
    SourceContext,
    file_stamp,
    record_documents,
    text_documents,
)


@dataclass(frozen=True, kw_only=True)
class HubData(SourceConfig):
    """A data set of the Hugging Face Hub, by name; or a local folder that `datasets` can read."""

    kind: Literal["hub"] = "hub"
    validation: float = 0.05
    name: str
    config: str | None = None
    split: str = "train"
    field: str | None = "text"
    """Field of a record that holds the text of a document; null uses the record's chat, in the chat
    template. Fine-tuning always reads chats, preference objectives pairs, reinforcement learning
    prompts.
    """
    revision: str | None = None
    on_bad_line: OnBadLine = "reject"

    def has_conversations(self, data_format: DataFormat) -> bool:
        """Return True if the source's samples are conversations in this data format."""
        return data_format.is_chat or self.field is None

    def open(self, data_format: DataFormat, context: SourceContext) -> DataSource:
        """Open the data set, which is downloaded when it is read first."""

        def read() -> Iterator[Document | Reject]:
            label = self.describe_download()
            rows = files.read_records(self._download(context))
            records = (row._replace(file=label) for row in rows)
            if self.field is not None and not data_format.is_chat:
                return text_documents(records, self.field)
            return record_documents(records, data_format)

        folder = files.expand_path(self.name)
        stamps = (
            [file_stamp(path) for path in sorted(folder.rglob("*")) if path.is_file()]
            if folder.is_dir()
            else []
        )
        return DataSource(
            name=folder.name,
            config=self,
            fingerprint=[to_plain(self), *stamps],
            train=read,
            fails_on_bad_line=self.on_bad_line == "fail",
        )

    def describe_download(self) -> str:
        """Return the name, configuration, split and revision."""
        parts = [self.name, self.config, self.split, self.revision]
        return ":".join(part for part in parts if part)

    def _download(self, context: SourceContext) -> Path:
        """Write the records (the first `limit` of them) as JSON lines, unless the file exists."""
        label = self.describe_download()
        digest = hashlib.sha256(f"{label} {self.limit}".encode()).hexdigest()
        path = context.download_dir / f"{digest[:16]}.jsonl"
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        count = f", {format_count(self.limit)} rows" if self.limit else ""
        context.say(f" prepare   fetching {label} through `datasets`{count}")
        progress = Progress(f"fetching {self.name}", None, context.say, context.stop)
        with path.open("w", encoding="utf-8") as file:
            for row in itertools.islice(_stream(self), self.limit):
                line = json.dumps(row, default=str) + "\n"
                file.write(line)
                progress.advance(len(line))
        return path


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

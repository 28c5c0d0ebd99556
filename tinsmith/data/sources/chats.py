"""Your own chats, preference pairs or prompts: `kind: chats`."""

from dataclasses import dataclass
from typing import Literal

from tinsmith.core.errors import UserError
from tinsmith.data import files
from tinsmith.data.formats.base import DataFormat
from tinsmith.data.sources.base import (
    DataSource,
    OnBadLine,
    SourceConfig,
    SourceContext,
    find_split_files,
    open_file_set,
    record_documents,
)


@dataclass(frozen=True, kw_only=True)
class ChatsData(SourceConfig):
    """Your own chats: .jsonl, .json, .csv, .tsv or .parquet, or a folder of them. An objective that
    reads pairs or prompts finds them in the same records.
    """

    kind: Literal["chats"] = "chats"
    path: str
    on_bad_line: OnBadLine = "reject"

    def has_conversations(self, data_format: DataFormat) -> bool:
        """Return True if the source's samples are conversations in this data format."""
        return True

    def open(self, data_format: DataFormat, context: SourceContext) -> DataSource:
        """Find the files."""
        file_set = find_split_files(self.path, self.validation, context.key)
        for path in file_set.train + file_set.validation:
            formats = ", ".join(suffix for suffix in files.SUFFIXES if suffix != ".txt")
            if path.name.lower().endswith(".txt"):
                raise UserError(f"{path}: chats are read from {formats}, not from .txt")
        return open_file_set(
            self,
            self.path,
            file_set,
            lambda path: record_documents(files.read_records(path), data_format),
            fails_on_bad_line=self.on_bad_line == "fail",
        )

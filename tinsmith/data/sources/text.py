"""Your own texts: `kind: text`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinsmith.data import files
from tinsmith.data.documents import Document
from tinsmith.data.files import Reject
from tinsmith.data.formats.base import DataFormat
from tinsmith.data.sources.base import (
    DataSource,
    OnBadLine,
    SourceConfig,
    SourceContext,
    find_split_files,
    open_file_set,
    text_documents,
)


@dataclass(frozen=True, kw_only=True)
class TextData(SourceConfig):
    """Your own text: .txt, .jsonl, .jsonl.gz or .parquet, or a folder of them."""

    kind: Literal["text"] = "text"
    path: str
    field: str = "text"
    """Field of a record that holds the text."""
    on_bad_line: OnBadLine = "reject"

    formats = ("documents",)

    def open(self, data_format: DataFormat, context: SourceContext) -> DataSource:
        """Find the files."""
        return open_file_set(
            self,
            self.path,
            find_split_files(self.path, self.validation, context.key),
            self._read,
            fails_on_bad_line=self.on_bad_line == "fail",
            can_cut=True,
        )

    def _read(self, path: Path) -> Iterator[Document | Reject]:
        if path.name.lower().endswith(".txt"):
            return map(_text_document, files.read_texts(path))
        return text_documents(files.read_records(path, [self.field]), self.field)


def _text_document(chunk: files.TextChunk | Reject) -> Document | Reject:
    if isinstance(chunk, Reject):
        return chunk
    key = chunk.text.encode()
    return Document(chunk.text, key, chunk.file, chunk.line, chunk.first, chunk.last)

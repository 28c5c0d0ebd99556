"""Readers for what people bring: .txt, .jsonl, .jsonl.gz, .parquet, and folders of them.

Readers stream and never stop at a bad line: they yield a Reject with file, physical line and reason
in its place. What cannot be read at all (a missing file, no permission, not a parquet file) raises
UserError.
"""

import codecs
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, cast

from tinsmith.core.errors import UserError
from tinsmith.core.parse import did_you_mean
from tinsmith.core.units import format_size

MAX_LINE_BYTES = 10_000_000
"""Bytes of a .jsonl line; a longer one is rejected without being kept in memory."""
CHUNK_CHARS = 1_000_000
"""Characters after which a long .txt document is handed on in pieces, cut at the end of a line."""
DOCUMENT_SEPARATOR = "<|endoftext|>"
"""Alone on a line of a .txt file, ends a document."""
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
_BOM = codecs.BOM_UTF8


class Reject(NamedTuple):
    """A line (or row of a parquet file, both from 1) that cannot be used, and why."""

    file: str
    line: int
    reason: str


class TextChunk(NamedTuple):
    """A document, or a piece of a long one: `first` and `last` tell where it begins and ends."""

    text: str
    file: str
    line: int
    first: bool = True
    last: bool = True


class Record(NamedTuple):
    """An object from a line of JSON or a row of a table."""

    data: dict[str, Any]
    file: str
    line: int


def expand_path(path: str) -> Path:
    """A path as a recipe writes it: `~` and `$NAME` stand for what they do in a shell."""
    return Path(os.path.expandvars(path)).expanduser()


def find_files(path: str, key: str = "data.path") -> list[Path]:
    """The files that `path` stands for: itself, or everything known below a folder, sorted.

    UserError where there is nothing; `key` is the setting that a message names.
    """
    start = expand_path(path)
    try:
        found = _below(start) if start.is_dir() else [start]
        near = None if start.exists() else _nearest(start)
    except OSError as error:
        raise UserError(f"{key}: {start}: {error.strerror}") from None
    known = ", ".join(SUFFIXES)
    if not found:
        raise UserError(f"{key}: no {known} file in the folder {start}")
    if near is not None:
        raise UserError(f"{key}: {start} does not exist{near}")
    if not _known(found[0]):
        raise UserError(f"{key}: {start} is not of a known kind; use {known} or a folder of them")
    return found


def read_texts(path: Path) -> Iterator[TextChunk | Reject]:
    """Documents of a .txt file: between lines `<|endoftext|>`, or the whole file. CRLF becomes LF,
    a BOM goes.

    A line that is not UTF-8 or holds a NUL is left out and reported. A line may be of any length.
    """
    held: list[str] = []
    length, begin, first = 0, 1, True
    for number, line in _decoded_lines(path):
        if isinstance(line, Reject):
            yield line
        elif line.strip() == DOCUMENT_SEPARATOR:
            if not first or "".join(held).strip():
                yield TextChunk("".join(held), str(path), begin, first, True)
            held, length, begin, first = [], 0, number + 1, True
        else:
            if length >= CHUNK_CHARS:
                yield TextChunk("".join(held), str(path), begin, first, False)
                held, length, begin, first = [], 0, number, False
            held.append(line)
            length += len(line)
    if not first or "".join(held).strip():
        yield TextChunk("".join(held), str(path), begin, first, True)


def read_records(path: Path, columns: list[str] | None = None) -> Iterator[Record | Reject]:
    """Objects of a .jsonl, .jsonl.gz or .parquet file; `columns` spares a parquet file from reading
    others."""
    return _parquet(path, columns) if path.name.endswith(".parquet") else _jsonl(path)


def _jsonl(path: Path) -> Iterator[Record | Reject]:
    for number, line in _lines(path):
        if isinstance(line, Reject):
            yield line
        elif line.strip():
            try:
                yield Record(parse_object(line), str(path), number)
            except ValueError as error:
                yield Reject(str(path), number, str(error))


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object of one line. Raises ValueError that says what is wrong with it."""
    try:
        record = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ValueError("not usable JSON: nested too deeply") from None
    except ValueError:
        raise ValueError("not usable JSON: a number of too many digits") from None
    if not isinstance(record, dict):
        raise ValueError(f"not an object but {_kind_of(record)}")
    return record


def get_text(record: dict[str, Any], field: str) -> str:
    """The text in `field` of a row. Raises ValueError where it is missing, not text, empty or
    unusable."""
    if field not in record:
        raise ValueError(f"no field '{field}' (it has {', '.join(map(str, record)) or 'none'})")
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"field '{field}' is {_kind_of(text)}, not text")
    if not text.strip():
        raise ValueError(f"field '{field}' is empty")
    check_text(text)
    return text


def check_text(value: Any) -> None:
    """Raises ValueError where a text, or any text inside a list or object, holds a NUL or a lone
    surrogate."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("holds a NUL character")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("holds a lone surrogate, which is no character") from None
    elif isinstance(value, dict):
        for item in value.values():
            check_text(item)
    elif isinstance(value, list):
        for item in value:
            check_text(item)


def _parquet(path: Path, columns: list[str] | None) -> Iterator[Record | Reject]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [name for name in columns or [] if name not in names]
            if missing:
                raise UserError(
                    f"{path}: no column '{missing[0]}' (it has {', '.join(names)}); set data.field"
                )
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield Record(record, str(path), number)
    except PermissionError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not a readable parquet file ({str(error).splitlines()[0]})"
        ) from None


def _lines(path: Path) -> Iterator[tuple[int, bytes | Reject]]:
    """(number, line without its end) of every physical line, a Reject for one that is too long."""
    number = 0
    with _opened(path) as file:
        try:
            while line := file.readline(MAX_LINE_BYTES + 2):
                number += 1
                raw = line.removeprefix(_BOM) if number == 1 else line
                if len(raw.rstrip(b"\r\n")) <= MAX_LINE_BYTES:
                    yield number, raw
                    continue
                yield (
                    number,
                    Reject(str(path), number, f"longer than {format_size(MAX_LINE_BYTES)}"),
                )
                while line and not line.endswith(b"\n"):
                    line = file.readline(CHUNK_CHARS)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            yield (
                number + 1,
                Reject(
                    str(path), number + 1, "the compressed file is damaged or cut off from here on"
                ),
            )


def _decoded_lines(path: Path) -> Iterator[tuple[int, str | Reject]]:
    """(number, line with its end as LF); a very long line comes in several parts of the same
    number."""
    number = 1
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _opened(path) as file:
        if file.read(len(_BOM)) != _BOM:
            file.seek(0)
        while part := file.readline(CHUNK_CHARS):
            ended = part.endswith(b"\n")
            try:
                text = decoder.decode(
                    part, final=ended or len(part) < CHUNK_CHARS or not file.peek(1)
                )
                check_text(text)
                yield number, f"{text[:-2]}\n" if text.endswith("\r\n") else text
            except UnicodeDecodeError:
                decoder.reset()
                yield number, Reject(str(path), number, "not UTF-8")
            except ValueError as error:
                yield number, Reject(str(path), number, str(error))
            number += ended


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
            yield cast(BufferedReader, file)
    except gzip.BadGzipFile:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _below(folder: Path) -> list[Path]:
    """Known files below a folder, without hidden ones, sorted."""
    return sorted(
        path
        for path in folder.rglob("*")
        if _known(path) and not _hidden(path.relative_to(folder)) and path.is_file()
    )


def _nearest(path: Path) -> str:
    parent = path.parent
    return did_you_mean(path.name, [p.name for p in parent.iterdir()]) if parent.is_dir() else ""


def _known(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _kind_of(value: Any) -> str:
    names = {
        str: "text",
        list: "a list",
        dict: "an object",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")

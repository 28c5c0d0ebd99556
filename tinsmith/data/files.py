"""Readers of input files: .txt, .jsonl, .jsonl.gz, .json, .csv, .tsv, .parquet, and folders of
them. All but .json are streams.

Readers do not stop at a bad line: they yield a Reject with the file, the line number and the reason
instead. A file that cannot be read at all (missing, no permission, not a parquet file) raises
UserError.
"""

import codecs
import csv
import gzip
import io
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
"""Maximum bytes of a .jsonl line; a longer one is rejected without being kept in memory."""
CHUNK_CHARS = 1_000_000
"""Characters after which a long .txt document is cut into pieces, at the end of a line."""
DOCUMENT_SEPARATOR = "<|endoftext|>"
"""Line of a .txt file that ends a document."""
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet")
_BOM = codecs.BOM_UTF8


class Reject(NamedTuple):
    """A line of a file, or row of a parquet file, that cannot be used. `line` counts from 1."""

    file: str
    line: int
    reason: str


class TextChunk(NamedTuple):
    """A document, or a piece of a long one. `first` and `last` mark its first and last piece."""

    text: str
    file: str
    line: int
    first: bool = True
    last: bool = True


class Record(NamedTuple):
    """A JSON object of a line, or a row of a parquet file as a dictionary."""

    data: dict[str, Any]
    file: str
    line: int
    unread: tuple[str, ...] = ()
    """Columns of a parquet file that were not selected."""


def expand_path(path: str) -> Path:
    """Expand `~` and environment variables (`$NAME`) in a path of a recipe."""
    return Path(os.path.expandvars(path)).expanduser()


def find_files(path: str, key: str = "data.path") -> list[Path]:
    """Return `path` itself, or all files with a known suffix in a folder and its subfolders,
    sorted.

    Raise UserError if there is none. `key` is the recipe key that the message names.
    """
    root = expand_path(path)
    try:
        paths = _files_in(root) if root.is_dir() else [root]
        suggestion = None if root.exists() else _suggest(root)
    except OSError as error:
        raise UserError(f"{key}: {root}: {error.strerror}") from None
    suffixes = ", ".join(SUFFIXES)
    if not paths:
        raise UserError(f"{key}: no {suffixes} file in the folder {root}")
    if suggestion is not None:
        raise UserError(f"{key}: {root} does not exist{suggestion}")
    if not _has_known_suffix(paths[0]):
        raise UserError(f"{key}: {root} is not of a known kind; use {suffixes} or a folder of them")
    return paths


def read_texts(path: Path) -> Iterator[TextChunk | Reject]:
    """Yield the documents of a .txt file: the text between lines `<|endoftext|>`, or the whole
    file. CRLF becomes LF, and a byte order mark is removed.

    A line that is not UTF-8 or contains a NUL is rejected. Lines may be of any length.
    """
    buffer: list[str] = []
    length, begin, first = 0, 1, True
    for line_number, line in _decoded_lines(path):
        if isinstance(line, Reject):
            yield line
        elif line.strip() == DOCUMENT_SEPARATOR:
            if not first or "".join(buffer).strip():
                yield TextChunk("".join(buffer), str(path), begin, first, True)
            buffer, length, begin, first = [], 0, line_number + 1, True
        else:
            if length >= CHUNK_CHARS:
                yield TextChunk("".join(buffer), str(path), begin, first, False)
                buffer, length, begin, first = [], 0, line_number, False
            buffer.append(line)
            length += len(line)
    if not first or "".join(buffer).strip():
        yield TextChunk("".join(buffer), str(path), begin, first, True)


def read_records(path: Path, columns: list[str] | None = None) -> Iterator[Record | Reject]:
    """Return an iterator over the records of a file that is not .txt. With `columns`, only these
    columns of a parquet file are read.
    """
    if _has_suffix(path, ".parquet"):
        return _read_parquet(path, columns)
    if _has_suffix(path, ".json"):
        return _read_json(path)
    if _has_suffix(path, ".csv") or _has_suffix(path, ".tsv"):
        return _read_csv(path)
    return _read_jsonl(path)


def _read_json(path: Path) -> Iterator[Record | Reject]:
    """Yield the objects of an array (Alpaca, ShareGPT), or a single object. `line` counts them. A
    file of several JSON values is read as JSON lines.
    """
    with _open(path) as file:
        try:
            items = json.loads(file.read().removeprefix(_BOM))
        except (ValueError, RecursionError):
            items = None
    if not isinstance(items, list | dict):
        yield from _read_jsonl(path)
        return
    for number, item in enumerate([items] if isinstance(items, dict) else items, 1):
        if isinstance(item, dict):
            yield Record(item, str(path), number)
        else:
            yield Reject(str(path), number, f"not an object but {_type_name(item)}")


def _read_csv(path: Path) -> Iterator[Record | Reject]:
    """Yield the rows below the header as objects of texts. Empty cells are absent."""
    delimiter = "\t" if _has_suffix(path, ".tsv") else ","
    csv.field_size_limit(MAX_LINE_BYTES)
    with _open(path) as file:
        rows = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter)
        number = 1
        try:
            header = next(rows, [])
            for row in rows:
                number = rows.line_num
                if len(row) > len(header):
                    reason = f"{len(row)} cells, but the header has {len(header)}"
                    yield Reject(str(path), number, reason)
                elif row:
                    cells = zip(header, row, strict=False)
                    yield Record({name: cell for name, cell in cells if cell}, str(path), number)
        except (csv.Error, UnicodeDecodeError) as error:
            reason = f"not readable as {delimiter!r}-separated UTF-8 from here on ({error})"
            yield Reject(str(path), number + 1, reason)


def _read_jsonl(path: Path) -> Iterator[Record | Reject]:
    for line_number, line in _raw_lines(path):
        if isinstance(line, Reject):
            yield line
        elif line.strip():
            try:
                yield Record(parse_object(line), str(path), line_number)
            except ValueError as error:
                yield Reject(str(path), line_number, str(error))


def parse_object(line: bytes) -> dict[str, Any]:
    """Return the JSON object of one line. Raise ValueError, with the reason, if it has none."""
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
        raise ValueError(f"not an object but {_type_name(record)}")
    return record


def get_text(record: dict[str, Any], field: str) -> str:
    """Return the text in `field` of a record. Raise ValueError if it is missing, not text, empty,
    or refused by `check_text`.
    """
    if field not in record:
        raise ValueError(f"no field '{field}' (it has {', '.join(map(str, record)) or 'none'})")
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"field '{field}' is {_type_name(text)}, not text")
    if not text.strip():
        raise ValueError(f"field '{field}' is empty")
    check_text(text)
    return text


def check_text(value: Any) -> None:
    """Raise ValueError if a text, or any text in a list or object, contains a NUL character or a
    lone surrogate.
    """
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


def _read_parquet(path: Path, columns: list[str] | None) -> Iterator[Record | Reject]:
    import pyarrow
    import pyarrow.parquet

    row_number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [name for name in columns or [] if name not in names]
            unread = tuple(name for name in names if name not in (columns or names))
            if missing:
                raise UserError(
                    f"{path}: no column '{missing[0]}' (it has {', '.join(names)}); set data.field"
                )
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    record = {name: _drop_nulls(value) for name, value in row.items()}
                    row_number += 1
                    yield Record(record, str(path), row_number, unread)
    except PermissionError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not a readable parquet file ({str(error).splitlines()[0]})"
        ) from None


def _drop_nulls(value: Any) -> Any:
    """Return a value without the fields of structs that are null: Arrow gives every struct of a
    column the fields of all of them.
    """
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes | Reject]]:
    """Yield (line number, line), or (line number, Reject) for a line that is too long."""
    line_number = 0
    with _open(path) as file:
        try:
            while line := file.readline(MAX_LINE_BYTES + 2):
                line_number += 1
                raw = line.removeprefix(_BOM) if line_number == 1 else line
                if len(raw.rstrip(b"\r\n")) <= MAX_LINE_BYTES:
                    yield line_number, raw
                    continue
                reason = f"longer than {format_size(MAX_LINE_BYTES)}"
                yield line_number, Reject(str(path), line_number, reason)
                while line and not line.endswith(b"\n"):
                    line = file.readline(CHUNK_CHARS)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            reason = "the compressed file is damaged or cut off from here on"
            yield line_number + 1, Reject(str(path), line_number + 1, reason)


def _decoded_lines(path: Path) -> Iterator[tuple[int, str | Reject]]:
    """Yield (line number, decoded line). A line ends with LF. A very long line is yielded in
    several parts with the same line number.
    """
    line_number = 1
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open(path) as file:
        if file.read(len(_BOM)) != _BOM:
            file.seek(0)
        while part := file.readline(CHUNK_CHARS):
            ended = part.endswith(b"\n")
            try:
                text = decoder.decode(
                    part, final=ended or len(part) < CHUNK_CHARS or not file.peek(1)
                )
                check_text(text)
                yield line_number, f"{text[:-2]}\n" if text.endswith("\r\n") else text
            except UnicodeDecodeError:
                decoder.reset()
                yield line_number, Reject(str(path), line_number, "not UTF-8")
            except ValueError as error:
                yield line_number, Reject(str(path), line_number, str(error))
            line_number += ended


@contextmanager
def _open(path: Path) -> Iterator[BufferedReader]:
    try:
        with gzip.open(path, "rb") if _has_suffix(path, ".gz") else path.open("rb") as file:
            yield cast(BufferedReader, file)
    except gzip.BadGzipFile:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _files_in(folder: Path) -> list[Path]:
    """Return the files with a known suffix in a folder and its subfolders, sorted, without hidden
    ones, and without .json files of a single object, which describe data.
    """
    return sorted(
        path
        for path in folder.rglob("*")
        if _has_known_suffix(path)
        and not _is_hidden(path.relative_to(folder))
        and path.is_file()
        and (not _has_suffix(path, ".json") or _holds_records(path))
    )


def _holds_records(path: Path) -> bool:
    """Return True if a .json file holds a list, or a JSON object per line."""
    with path.open("rb") as file:
        first, second = (file.readline(MAX_LINE_BYTES).removeprefix(_BOM).strip() for _ in "ab")
    if (first or second).startswith(b"["):
        return True
    try:
        return bool(second) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _suggest(path: Path) -> str:
    """Return a suggestion for a missing path: the most similar name in the same folder."""
    parent = path.parent
    return did_you_mean(path.name, [p.name for p in parent.iterdir()]) if parent.is_dir() else ""


def _has_known_suffix(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _has_suffix(path: Path, suffix: str) -> bool:
    return path.name.lower().endswith(suffix)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _type_name(value: Any) -> str:
    names = {
        str: "text",
        list: "a list",
        dict: "an object",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")

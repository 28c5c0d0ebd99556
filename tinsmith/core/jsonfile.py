"""Read JSON objects from untrusted files, with a size limit."""

import json
from pathlib import Path
from typing import Any, cast

from tinsmith.core.errors import UserError

MAX_JSON_BYTES = 64 * 2**20
"""Largest JSON file to read. The index of a model with a million tensors is smaller."""


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raise UserError, which names the file, if it cannot be read, is longer than `MAX_JSON_BYTES`, or
    holds anything but one object.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if len(raw) > MAX_JSON_BYTES:
        raise UserError(f"{path}: longer than {MAX_JSON_BYTES} bytes, not a model's file")
    try:
        content = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return cast("dict[str, Any]", content)

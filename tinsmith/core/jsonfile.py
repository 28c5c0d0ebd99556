"""JSON objects from files that came from anywhere."""

import json
from pathlib import Path
from typing import Any

from tinsmith.core.errors import UserError

LARGEST = 64 * 2**20
"""Bytes; the index of a model of a million tensors is smaller."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    UserError names the file where it cannot be read, is longer than `LARGEST`, or holds anything
    but one object.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if len(raw) > LARGEST:
        raise UserError(f"{path}: longer than {LARGEST} bytes, which no such file should be")
    try:
        content = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content

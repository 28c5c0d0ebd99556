"""JSON objects of records that note which of their fields are accessed, and JSON text in them."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tinsmith.core.errors import UserError

MAX_JSON_DEPTH = 64
"""Largest nesting depth of JSON in tools and arguments."""
_WRAPPED_LEVELS = 8
"""Nesting depth down to which objects are wrapped: a record, its messages, their calls."""


class BadRecord(UserError):
    """A chat record that cannot be used. The message is a short reason."""


class Fields(dict[str, Any]):
    """A JSON object that notes which of its fields are accessed. A field that is null is absent.

    Nested objects are `Fields` too. An object none of whose fields is accessed by name (a tool
    description, the arguments of a call) is used as a whole.
    """

    def __init__(self, data: Mapping[str, Any], levels: int = _WRAPPED_LEVELS):
        super().__init__((key, _wrap(value, levels)) for key, value in data.items())
        self._accessed: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """Return a field, or `default` if it is absent, and note the access."""
        self._accessed.add(key)
        value = super().get(key)
        return default if value is None else value

    def __contains__(self, key: object) -> bool:
        """Return True if the field is not absent, without noting an access."""
        return super().get(str(key)) is not None

    def peek(self, key: str) -> Any:
        """Return a field without noting the access."""
        return super().get(key)

    def first(self, *keys: str) -> Any:
        """Return the first of these fields that is not empty, or else one that is not absent."""
        for key in keys:
            if not _is_empty(self.peek(key)):
                return self.get(key)
        return next((self.get(key) for key in keys if key in self), None)

    def decode(self, key: str, where: str) -> Any:
        """Return a field that may be JSON text. The decoded value replaces the text."""
        value = self.get(key)
        if isinstance(value, str):
            self[key] = value = _wrap(decode_json(value, where), _WRAPPED_LEVELS)
        return check_json(value, where)

    def unread(self) -> Iterator[str]:
        """Yield the names of fields that are neither empty nor accessed, such as `context` or
        `messages.name`.
        """
        for key, value in self.items():
            if _is_empty(value):
                continue
            if key not in self._accessed:
                yield key
                continue
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, Fields) and item._accessed:
                    yield from (f"{key}.{name}" for name in item.unread())


def as_fields(record: Any) -> Fields:
    """Return a record as `Fields`. Raise BadRecord if it is not an object."""
    if not isinstance(record, dict):
        raise BadRecord("not a JSON object")
    return record if isinstance(record, Fields) else Fields(record)


def plain(value: Any) -> Any:
    """Return a JSON value with plain dictionaries."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def decode_json(value: Any, where: str) -> Any:
    """Decode a value that may be JSON text, or several lines of it (a list). Empty text gives
    None.
    """
    if isinstance(value, str):
        lines = [line for line in value.splitlines() if line.strip()]
        try:
            value = json.loads(value) if lines else None
        except (ValueError, RecursionError):
            try:
                value = [json.loads(line) for line in lines]
            except (ValueError, RecursionError):
                raise BadRecord(f"{where}: not valid JSON") from None
    return check_json(value, where)


def check_json(value: Any, where: str, depth: int = 0) -> Any:
    """Return the value after checking that it is JSON of limited depth without lone surrogates."""
    if depth > MAX_JSON_DEPTH:
        raise BadRecord(f"{where}: nested more than {MAX_JSON_DEPTH} levels deep")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRecord(f"{where} contains a lone surrogate") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            check_json(item, where, depth + 1)
            if not isinstance(key, str):
                raise BadRecord(f"{where}: a key is not text")
            check_json(key, where)
    elif isinstance(value, list):
        for item in value:
            check_json(item, where, depth + 1)
    elif not isinstance(value, int | float | None):
        raise BadRecord(f"{where}: a {type(value).__name__} is not JSON")
    return value


def _wrap(value: Any, levels: int) -> Any:
    if isinstance(value, Fields) or not levels:
        return value
    if isinstance(value, dict):
        return Fields(value, levels - 1)
    return [_wrap(item, levels - 1) for item in value] if isinstance(value, list) else value


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {}) or (isinstance(value, str) and not value.strip())

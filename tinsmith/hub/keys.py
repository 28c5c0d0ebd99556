"""Read a `config.json` key by key; errors name the file and the key."""

import math
from typing import Any, NoReturn

from tinsmith.core.errors import UserError

DEFAULT_MAX_SIZE = 2**20
MAX_SIZES = {
    "vocab_size": 2**28,
    "max_position_embeddings": 2**40,
    "original_max_position_embeddings": 2**40,
    "num_hidden_layers": 4096,
    "depth": 4096,
}
"""Upper bounds of sizes, so that a malicious file cannot exhaust memory."""


class ConfigReader:
    """The keys of one JSON object; every method raises UserError with file and key.

    A missing or null key has the value `default`; without a default the key is required.
    """

    def __init__(self, data: dict[str, Any], where: str):
        self.data = data
        self.where = where

    def fail(self, key: str, problem: str) -> NoReturn:
        """Raise UserError about one key."""
        raise UserError(f"{self.where}: {key}: {problem}")

    def positive_int(self, key: str, default: int | None = None) -> int:
        """Return an integer of at least 1."""
        value = self._required(key, default)
        largest = MAX_SIZES.get(key, DEFAULT_MAX_SIZE)
        if type(value) is not int or not 1 <= value <= largest:
            self.fail(key, f"must be a whole number from 1 to {largest} (got {value!r:.60})")
        return value

    def optional_positive_int(self, key: str, default: int | None = None) -> int | None:
        """Return an integer of at least 1, or None if the value is null."""
        return None if self.data.get(key, default) is None else self.positive_int(key, default)

    def number(self, key: str, default: float | None = None, above: float = 0.0) -> float:
        """Return a finite number greater than `above`."""
        value = self._required(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= above:
            self.fail(key, f"must be a number above {above:g} (got {value!r:.60})")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """Return a finite number greater than 0, or None if the key is missing or null."""
        return None if self.data.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        value = self._required(key, default)
        if type(value) is not bool:
            self.fail(key, f"must be true or false (got {value!r:.60})")
        return value

    def check_allowed(self, key: str, allowed: tuple[Any, ...]) -> None:
        """Raise UserError if a key is present with a value that Tinsmith does not support."""
        value = self.data.get(key)
        if value is not None and value not in allowed:
            shown = ", ".join(repr(choice) for choice in allowed) or "null"
            self.fail(key, f"{value!r:.60} is not supported (only {shown})")

    def _required(self, key: str, default: Any) -> Any:
        value = self.data.get(key)
        value = default if value is None else value
        if value is None:
            self.fail(key, "required key is missing")
        return value

"""Reading a `config.json`, key by key, and saying which key is wrong."""

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
"""Sizes are bounded, so that a hostile file cannot ask for more than the machine has."""


class ConfigReader:
    """The keys of one JSON object; every reader raises UserError with file and key.

    `default` is what a silent (or, for `given`, null) file means; without one the key is required.
    """

    def __init__(self, data: dict[str, Any], where: str):
        self.data = data
        self.where = where

    def fail(self, key: str, problem: str) -> NoReturn:
        """UserError about one key."""
        raise UserError(f"{self.where}: {key}: {problem}")

    def positive_int(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self._given(key, default)
        largest = MAX_SIZES.get(key, DEFAULT_MAX_SIZE)
        if type(value) is not int or not 1 <= value <= largest:
            self.fail(key, f"must be a whole number from 1 to {largest} (got {value!r:.60})")
        return value

    def optional_positive_int(self, key: str, default: int | None = None) -> int | None:
        """A whole number of at least 1, or None where the file says null."""
        return None if self.data.get(key, default) is None else self.positive_int(key, default)

    def number(self, key: str, default: float | None = None, above: float = 0.0) -> float:
        """A finite number greater than `above`."""
        value = self._given(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= above:
            self.fail(key, f"must be a number above {above:g} (got {value!r:.60})")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A finite number greater than 0, or None where there is none."""
        return None if self.data.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._given(key, default)
        if type(value) is not bool:
            self.fail(key, f"must be true or false (got {value!r:.60})")
        return value

    def check_allowed(self, key: str, allowed: tuple[Any, ...]) -> None:
        """Refuse any value that would make another model than Tinsmith builds."""
        value = self.data.get(key)
        if value is not None and value not in allowed:
            shown = ", ".join(repr(choice) for choice in allowed) or "null"
            self.fail(key, f"{value!r:.60} is not supported (only {shown})")

    def _given(self, key: str, default: Any) -> Any:
        value = self.data.get(key)
        value = default if value is None else value
        if value is None:
            self.fail(key, "required key is missing")
        return value

"""Chat templates: Jinja programs, perhaps downloaded, that can neither reach out nor run away."""

from functools import lru_cache
from threading import Lock
from typing import Any

from tinsmith.core.errors import UserError
from tinsmith.text.template_limits import Bounded, Refused, rewritten

LONGEST = 128 * 1024
"""Characters of a template."""


class ChatTemplate:
    """A compiled template; UserError where it is too long, not Jinja, or does what is forbidden."""

    def __init__(self, source: str):
        if len(source) > LONGEST:
            raise UserError(f"the chat template is longer than {LONGEST} characters")
        self._environment = Bounded()
        self._lock = Lock()
        try:
            tree = rewritten(self._environment.parse(source))
            self._template = self._environment.from_string(tree)
        except Exception as error:  # it may break the parser, the compiler and Python's own limits
            raise UserError(f"the chat template cannot be used: {_first_line(error)}") from None

    def render(self, variables: dict[str, Any], room: int) -> str:
        """The text for these variables; all that is emitted on the way fits in `room` characters.

        Refused, with the template's own words, where it calls `raise_exception`; UserError where
        it fails in any other way, a bound that it meets included.
        """
        with self._lock:
            self._environment.start(room)
            try:
                return self._template.render(variables)
            except Refused:
                raise
            except Exception as error:  # a program, and fails like one in every possible way
                raise UserError(f"the chat template failed: {_first_line(error)}") from None


@lru_cache(maxsize=16)
def compiled(source: str) -> ChatTemplate:
    """The template of this source, compiled once."""
    return ChatTemplate(source)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

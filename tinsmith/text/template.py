"""Compile and render chat templates: untrusted Jinja, sandboxed and limited in time and size."""

from functools import lru_cache
from threading import Lock
from typing import Any

from tinsmith.core.errors import UserError
from tinsmith.text.template_limits import BoundedEnvironment, TemplateRefused, rewrite_template

MAX_TEMPLATE_CHARS = 128 * 1024
"""Largest length of a template."""


class ChatTemplate:
    """A compiled chat template. Raises UserError if it is too long, not Jinja, or uses a forbidden
    construct.
    """

    def __init__(self, source: str):
        if len(source) > MAX_TEMPLATE_CHARS:
            raise UserError(f"the chat template is longer than {MAX_TEMPLATE_CHARS} characters")
        self._environment = BoundedEnvironment()
        self._lock = Lock()
        try:
            tree = rewrite_template(self._environment.parse(source))
            self._template = self._environment.from_string(tree)
        except Exception as error:  # it may break the parser, the compiler or Python's limits
            raise UserError(f"the chat template cannot be used: {_first_line(error)}") from None

    def render(self, variables: dict[str, Any], room: int) -> str:
        """Render the template for these variables, with at most `room` characters of output.

        Raise TemplateRefused with the template's own message if it calls `raise_exception`, and
        UserError if it fails in any other way, limits included.
        """
        with self._lock:
            self._environment.start(room)
            try:
                return self._template.render(variables)
            except TemplateRefused:
                raise
            except Exception as error:  # a template is a program and can fail in any way
                raise UserError(f"the chat template failed: {_first_line(error)}") from None


@lru_cache(maxsize=16)
def compile_template(source: str) -> ChatTemplate:
    """Return the compiled template of this source, from a cache."""
    return ChatTemplate(source)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

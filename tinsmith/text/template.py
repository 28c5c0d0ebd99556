"""Chat templates: Jinja programs that may come from a download, run where they can neither reach out nor run away.

Jinja's sandbox keeps a template from Python's insides. What it does not bound is work: nested loops, macros that call
themselves, text that doubles. So the tree of a template is rewritten before it is compiled: every turn of a loop,
every call and every list that it makes costs a step, and whatever can lengthen a text is measured before it is done.
"""

import json
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import TemplateError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from tinsmith.core.errors import UserError

LONGEST = 128 * 1024
"""Characters of a template."""
STEPS = 200_000
"""Turns of loops, calls and parts of lists in one rendering."""
SECONDS = 10.0
"""One rendering; a real template needs a thousandth of it."""

_FILTERS = (
    *(
        "capitalize",
        "count",
        "default",
        "dictsort",
        "first",
        "int",
        "items",
        "last",
        "length",
        "list",
        "lower",
        "map",
    ),
    *("reject", "rejectattr", "reverse", "select", "selectattr", "title", "trim", "upper"),
)
_METHODS: tuple[tuple[type, tuple[str, ...]], ...] = (
    (dict, ("get", "items", "keys", "values")),
    (list, ("count", "index")),
    (
        str,
        (
            *(
                "capitalize",
                "count",
                "endswith",
                "find",
                "isdigit",
                "isspace",
                "lower",
                "lstrip",
                "removeprefix",
            ),
            *(
                "removesuffix",
                "replace",
                "rfind",
                "rsplit",
                "rstrip",
                "split",
                "splitlines",
                "startswith",
                "strip",
            ),
            *("title", "upper"),
        ),
    ),
)
_FORBIDDEN = (nodes.Block, nodes.Extends, nodes.FromImport, nodes.Import, nodes.Include)


class Refused(TemplateError):
    """A template's own `raise_exception`: it does not take these messages."""


class ChatTemplate:
    """A compiled template. UserError where it is too long, is not Jinja, or uses what is not allowed."""

    def __init__(self, source: str):
        if len(source) > LONGEST:
            raise UserError(
                f"the chat template has {len(source)} characters; at most {LONGEST} are allowed"
            )
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(
                _bounded(self._environment.parse(source))
            )
        except (
            Exception
        ) as error:  # a template may break the parser, the compiler and Python's limits
            raise UserError(f"the chat template cannot be used: {_first_line(error)}") from None

    def render(self, variables: dict[str, Any], room: int) -> str:
        """The text for these variables. All that the template emits on the way is at most `room` characters.

        Refused, with the template's own words, where it calls `raise_exception`; UserError where it fails otherwise.
        """
        self._environment.start(room)
        try:
            return self._template.render(variables)
        except Refused:
            raise
        except (
            Exception
        ) as error:  # a template is a program, and fails like one in every possible way
            raise UserError(f"the chat template failed: {_first_line(error)}") from None


@lru_cache(maxsize=16)
def compiled(source: str) -> ChatTemplate:
    """The template of this source, compiled once."""
    return ChatTemplate(source)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja with only what chat templates use, all of it bounded."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        self.filters = {name: self.filters[name] for name in _FILTERS}
        self.filters |= {
            "tojson": self._tojson,
            "join": self._join,
            "replace": self._replace,
            "string": self._text,
        }
        self.filters |= {"counted": self._counted, "made": self._made, "emitted": self._emitted}
        self.globals = {"range": self._range, "namespace": Namespace, "raise_exception": _refuse}
        self.start(0)

    def start(self, room: int) -> None:
        self._room = room
        self._emitted_so_far = 0
        self._steps = STEPS
        self._deadline = time.monotonic() + SECONDS

    def _step(self, steps: int = 1) -> None:
        self._steps -= steps
        if self._steps < 0 or time.monotonic() > self._deadline:
            raise SecurityError(f"it takes more than {STEPS} steps or {SECONDS:g} seconds")

    def _fits(self, length: int) -> None:
        if length > self._room:
            raise SecurityError(f"it makes more than {self._room} characters")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """The named methods of text, lists and dicts, and what Jinja's `loop` and `namespace` offer."""
        for kind, names in _METHODS:
            if isinstance(obj, kind):
                return attr in names
        return isinstance(obj, LoopContext | Namespace) and super().is_safe_attribute(
            obj, attr, value
        )

    def wrap_str_format(self, value: Any) -> None:
        """No `str.format`: it pads to any width. As an attribute that is not safe it is then refused."""

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Call something on the template's behalf, at the price of a step."""
        self._step()
        if (
            type(obj) is type("".replace)
            and isinstance(obj.__self__, str)
            and obj.__name__ == "replace"
        ):
            return self._replace(obj.__self__, *args, **kwargs)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Work out an intercepted operator, where the result cannot be large."""
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" or (operator == "%" and not numbers):
            raise SecurityError(f"the operator {operator} is not allowed here")
        if isinstance(left, int) and isinstance(right, int):
            if left.bit_length() + right.bit_length() > 256:
                raise SecurityError("its numbers grow too large")
        elif not numbers:
            self._step(_size(left, right, operator) // 1000 + 1)
            self._fits(_size(left, right, operator))
        return super().call_binop(context, operator, left, right)

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._step()
            yield value

    def _made(self, value: Any) -> Any:
        """Walk through lists and dicts: one that contains itself many times over runs out of steps here."""
        self._step()
        if isinstance(value, dict):
            for item in value.items():
                self._made(item)
        elif isinstance(value, list | tuple):
            for item in value:
                self._made(item)
        return value

    def _text(self, value: Any) -> str:
        if not isinstance(value, str | int | float | list | tuple | dict | Undefined | None):
            raise SecurityError(f"a {type(value).__name__} is not text")
        return value if isinstance(value, str) else str(self._made(value))

    def _emitted(self, value: Any) -> str:
        text = self._text(value)
        self._emitted_so_far += len(text)
        self._fits(self._emitted_so_far)
        return text

    def _tojson(self, value: Any, indent: int | None = None) -> str:
        self._fits((indent or 0) * 1000)
        return json.dumps(self._made(value), ensure_ascii=False, indent=indent)

    def _join(
        self, values: Iterable[Any], separator: str = "", attribute: str | None = None
    ) -> str:
        parts = [
            self._text(value if attribute is None else self.getitem(value, attribute))
            for value in values
        ]
        self._fits(sum(map(len, parts)) + len(separator) * len(parts))
        return separator.join(parts)

    def _replace(self, text: str, old: str, new: str, count: int = -1) -> str:
        self._fits(len(text) + text.count(old) * len(new))
        return text.replace(old, new, count)

    def _range(self, *args: int) -> range:
        values = range(*args)
        self._step(len(values))
        return values


class _Generation(Extension):
    """`{% generation %}`, by which some templates mark what the assistant says: here its body, no more."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Read up to `endgeneration` and stand for what is between."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _bounded(tree: nodes.Template) -> nodes.Template:
    """Rewrite the tree: loops count, lists are measured, output is added up, and `~` is a `join`."""
    for node in [tree, *tree.find_all(nodes.Node)]:
        if isinstance(node, _FORBIDDEN):
            raise ValueError(f"{type(node).__name__.lower()} is not allowed")
        if isinstance(node, nodes.For):
            if node.recursive:
                raise ValueError("recursive loops are not allowed")
            node.iter = _filtered(node.iter, "counted")
        elif isinstance(node, nodes.Output):
            node.nodes = [
                n if isinstance(n, nodes.TemplateData) else _filtered(n, "emitted")
                for n in node.nodes
            ]
        for field, value in node.iter_fields():
            if isinstance(value, list):
                value[:] = [_measured(item) for item in value]
            elif isinstance(value, nodes.Node):
                setattr(node, field, _measured(value))
    return tree


def _measured(node: Any) -> Any:
    if isinstance(node, nodes.Concat):
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "join")
    literal = isinstance(node, nodes.List | nodes.Dict) or (
        isinstance(node, nodes.Tuple) and node.ctx == "load"
    )
    return _filtered(node, "made") if literal else node


def _filtered(node: nodes.Node, name: str) -> Any:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)  # type: ignore[call-arg]


def _size(left: Any, right: Any, operator: str) -> int:
    """How long the sum or product of texts or lists will be."""
    lengths = [
        len(value) if isinstance(value, str | list | tuple) else None for value in (left, right)
    ]
    times = [value if isinstance(value, int) else 1 for value in (left, right)]
    if operator == "*":
        return (lengths[0] or 0) * times[1] + (lengths[1] or 0) * times[0]
    return sum(length or 0 for length in lengths)


def _refuse(message: str) -> NoReturn:
    raise Refused(message)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

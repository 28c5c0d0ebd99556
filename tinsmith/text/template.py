"""Compile and render chat templates: untrusted Jinja, sandboxed and limited in time and size.

Jinja's sandbox blocks access to Python internals, but it does not bound work: nested loops,
recursive macros, text that doubles. Therefore the template's syntax tree is rewritten before it is
compiled. Every loop iteration, call and list costs a step, and every operation that can lengthen a
text is measured before it runs.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import lru_cache, wraps
from string import Formatter
from threading import Lock
from typing import Any, NoReturn

from jinja2 import TemplateError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from tinsmith.core.errors import UserError

MAX_STEPS = 200_000
"""Largest number of loop iterations, calls and list items in one rendering."""

MAX_SECONDS = 10.0
"""Time limit of one rendering. A real template needs a thousandth of it."""

_FILTERS = (
    *("abs", "capitalize", "count", "default", "dictsort", "first", "float", "int"),
    *("items", "last", "length", "list", "lower", "map", "reject", "rejectattr", "reverse"),
    *("round", "select", "selectattr", "title", "trim", "upper", "wordcount"),
)

_SEQUENCE_FILTERS = ("batch", "groupby", "max", "min", "sort", "unique")
"""Filters that read all items of a sequence. Every item costs a step."""

_METHODS = {
    dict: ("get", "items", "keys", "values"),
    list: ("count", "index"),
    tuple: ("count", "grouper", "index", "list"),
    str: (
        *("capitalize", "count", "endswith", "find", "format", "index", "isalnum", "isalpha"),
        *("isdigit", "islower", "isnumeric", "isspace", "isupper", "join", "lower", "lstrip"),
        *("partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition"),
        *("rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper"),
    ),
}

_FORBIDDEN = (nodes.Block, nodes.Extends, nodes.FromImport, nodes.Import, nodes.Include)

_WIDE_FORMAT = re.compile(r"\d{4,}|[*{}\[]")
"""A format specification with a large or computed width, or access to attributes or items."""

_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&#39;", '"': "&#34;"})
_PERCENT_FIELD = re.compile(r"%[^a-zA-Z%]*[a-zA-Z%]")

_PLAIN = str | int | float | list | tuple | dict | Undefined | None


class TemplateRefused(TemplateError):
    """The template called `raise_exception`: it refuses these messages."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja environment with only the features of chat templates. `start` resets the limits."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        extensions = [loopcontrols, _Generation]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        standard = self.filters
        self.filters = {name: standard[name] for name in _FILTERS}
        self.filters |= {"join": self._join, "replace": self._replace, "string": self._text}
        self.filters |= {"counted": self._counted, "emitted": self._emitted}
        self.filters["made"] = self._count_parts
        self.filters |= {"tojson": self._tojson, "indent": self._indent, "sum": self._sum}
        self.filters |= {"e": self._escape, "escape": self._escape, "safe": self._text}
        self.filters |= {name: self._sequence_filter(standard[name]) for name in _SEQUENCE_FILTERS}
        self.globals = {"range": self._range, "namespace": Namespace, "raise_exception": _refuse}
        self.globals["strftime_now"] = self._strftime_now
        self._methods = {"replace": self._replace, "join": self._join_method}
        self._methods["format"] = self._format
        self.start(0)

    def start(self, room: int) -> None:
        """Start a rendering with at most `room` characters of output."""
        self._room = room
        self._output_length = 0
        self._steps = MAX_STEPS
        self._deadline = time.monotonic() + MAX_SECONDS

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allow listed methods of text, lists and dicts, and those of `loop` and `namespace`."""
        for value_type, names in _METHODS.items():
            if isinstance(obj, value_type):
                return attr in names
        is_template_object = isinstance(obj, LoopContext | Namespace)
        return is_template_object and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Leave `str.format` to `call`."""

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Call a function for the template and count one step."""
        self._step()
        if type(obj) is type("".replace) and isinstance(obj.__self__, str):
            method = self._methods.get(obj.__name__)
            if method is not None:
                kwargs = {k: v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")}
                return method(obj.__self__, *args, **kwargs)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Evaluate an intercepted operator if the result cannot be large."""
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "%" and isinstance(left, str):
            return self._percent(left, right)
        if operator == "**" or (operator == "%" and not numbers):
            raise SecurityError(f"the operator {operator} is not allowed here")
        if not numbers:
            self._check_length(_length(left, right, operator))
            self._step(_length(left, right, operator) // 1000 + 1)
        elif _bits(left) + _bits(right) > 256:
            raise SecurityError("its numbers become too large")
        return super().call_binop(context, operator, left, right)

    def _step(self, steps: int = 1) -> None:
        self._steps -= steps
        if self._steps < 0 or time.monotonic() > self._deadline:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps or {MAX_SECONDS:g} seconds")

    def _check_length(self, length: int) -> None:
        if length > self._room:
            raise SecurityError(f"its output is longer than {self._room} characters")

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._step()
            yield value

    def _count_parts(self, value: Any) -> Any:
        """Count the parts of a nested value as steps: a list may contain itself many times."""
        self._step()
        if isinstance(value, dict):
            value = {key: self._count_parts(item) for key, item in value.items()}
        elif isinstance(value, list | tuple):
            value = type(value)(self._count_parts(item) for item in value)
        return value

    def _text(self, value: Any) -> str:
        if not isinstance(value, _PLAIN):
            raise SecurityError(f"a {type(value).__name__} is not text")
        return value if isinstance(value, str) else str(self._count_parts(value))

    def _emitted(self, value: Any) -> str:
        text = self._text(value)
        self._output_length += len(text)
        self._check_length(self._output_length)
        return text

    def _tojson(
        self,
        value: Any,
        indent: int | None = None,
        ensure_ascii: bool = False,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if indent is not None and not 0 <= indent <= 8:
            raise SecurityError("tojson takes an indent of at most 8")
        if separators is not None and sum(map(len, map(str, separators))) > 8:
            raise SecurityError("tojson takes separators of at most 8 characters")
        return json.dumps(
            self._count_parts(value),
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def _sequence_filter(self, standard: Any) -> Any:
        @wraps(standard)
        def counted(*args: Any, **kwargs: Any) -> Any:
            at = 1 if hasattr(standard, "jinja_pass_arg") else 0
            sizes = [value for value in (*args, *kwargs.values()) if isinstance(value, int)]
            self._step(sum(map(abs, sizes)))
            return standard(*args[:at], list(self._counted(args[at])), *args[at + 1 :], **kwargs)

        return counted

    def _sum(self, values: Iterable[Any], attribute: str | None = None, start: float = 0) -> Any:
        total: Any = start
        for value in self._counted(values):
            item = value if attribute is None else self.getitem(value, attribute)
            if not isinstance(item, int | float) or not isinstance(total, int | float):
                raise SecurityError("sum takes numbers")
            total += item
        return total

    def _escape(self, value: Any) -> str:
        """Escape HTML. The result is no `Markup`, whose methods would not be limited."""
        text = self._text(value)
        self._check_length(len(text) * 5)
        return str(text).translate(_HTML)

    def _indent(self, text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
        if not isinstance(width, int) or not 0 <= width <= 64:
            raise SecurityError("indent takes a width of at most 64")
        self._check_length(len(text) + (width + 1) * (text.count("\n") + 1))
        return do_indent(text, width, first, blank)

    def _join_method(self, separator: str, values: Iterable[Any]) -> str:
        return self._join(values, separator)

    def _format(self, text: str, *args: Any, **kwargs: Any) -> str:
        """Format like `str.format`, without large widths and without access to attributes."""
        for _, name, specification, _ in Formatter().parse(text):
            if _WIDE_FORMAT.search(f"{specification or ''}") or set(name or "") & set(".["):
                raise SecurityError("a format with a computed or large width is not allowed")
        values = [self._plain(value) for value in args]
        return text.format(*values, **{key: self._plain(value) for key, value in kwargs.items()})

    def _percent(self, text: str, values: Any) -> str:
        """Format like `text % values`, without large widths."""
        if any(_WIDE_FORMAT.search(part) for part in _PERCENT_FIELD.findall(text)):
            raise SecurityError("a format with a computed or large width is not allowed")
        if isinstance(values, dict):
            return text % {key: self._plain(value) for key, value in values.items()}
        return text % (
            tuple(map(self._plain, values)) if isinstance(values, tuple) else self._plain(values)
        )

    def _plain(self, value: Any) -> Any:
        """Return a number as it is and anything else as a text."""
        return value if isinstance(value, int | float) else self._text(value)

    def _strftime_now(self, text: str) -> str:
        """Return the local date and time in this format, as chat templates of transformers do."""
        if len(text) > 100:
            raise SecurityError("strftime_now takes a format of at most 100 characters")
        return datetime.now().strftime(text)

    def _join(
        self, values: Iterable[Any], separator: str = "", attribute: str | None = None
    ) -> str:
        items = [item if attribute is None else self.getitem(item, attribute) for item in values]
        parts = [self._text(value) for value in items]
        self._check_length(sum(map(len, parts)) + len(separator) * len(parts))
        return separator.join(parts)

    def _replace(self, text: str, old: str, new: str, count: int = -1) -> str:
        self._check_length(len(text) + text.count(old) * len(new))
        return text.replace(old, new, count)

    def _range(self, *args: int) -> range:
        values = range(*args)
        self._step(len(values))
        return values


class _Generation(Extension):
    """Jinja extension for `{% generation %}`, which marks assistant text. Renders only its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Parse up to `endgeneration` and return the body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def rewrite_template(tree: nodes.Template) -> nodes.Template:
    """Rewrite the syntax tree so that loops, lists and output are counted, and `~` is a `join`.

    Raise ValueError for forbidden constructs: other templates, blocks, recursive loops.
    """
    for node in [tree, *tree.find_all(nodes.Node)]:
        if isinstance(node, _FORBIDDEN):
            raise ValueError(f"{type(node).__name__.lower()} is not allowed")
        if isinstance(node, nodes.For):
            if node.recursive:
                raise ValueError("recursive loops are not allowed")
            node.iter = _filtered(node.iter, "counted")
        elif isinstance(node, nodes.Output):
            node.nodes = [_emitted(part) for part in node.nodes]
        for field, value in node.iter_fields():
            if isinstance(value, list):
                value[:] = [_with_limit(item) for item in value]
            elif isinstance(value, nodes.Node):
                setattr(node, field, _with_limit(value))
    return tree


def _emitted(node: Any) -> Any:
    return node if isinstance(node, nodes.TemplateData) else _filtered(node, "emitted")


def _with_limit(node: Any) -> Any:
    if isinstance(node, nodes.Concat):
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "join")
    lists = isinstance(node, nodes.List | nodes.Dict)
    if lists or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return _filtered(node, "made")
    return node


def _filtered(node: nodes.Node, name: str) -> Any:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)  # type: ignore[call-arg]


def _length(left: Any, right: Any, operator: str) -> int:
    """Return the length of the sum or product of texts or lists without computing it."""
    lengths = [
        len(value) if isinstance(value, str | list | tuple) else 0 for value in (left, right)
    ]
    if operator == "+":
        return sum(lengths)
    times = [value if isinstance(value, int) else 1 for value in (left, right)]
    return max(lengths[0] * times[1], lengths[1] * times[0])


def _bits(number: float) -> int:
    return number.bit_length() if isinstance(number, int) else 0


def _refuse(message: str) -> NoReturn:
    raise TemplateRefused(message)


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

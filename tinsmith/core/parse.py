"""Parse YAML and plain data into frozen config dataclasses, with one-line errors.

Config classes inherit from `Config`. pydantic and PyYAML are imported only here and only inside
functions, so that importing a model does not load them.
"""

import difflib
import re
import types
from dataclasses import fields, is_dataclass
from functools import lru_cache, partial
from typing import (
    Annotated,
    Any,
    ClassVar,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from tinsmith.core.errors import UserError
from tinsmith.core.plugins import imported_variants, outside_variants
from tinsmith.core.renamed_keys import new_key, new_kind

T = TypeVar("T")


class Config:
    """Base of every config dataclass. Unknown keys are errors, and `true`, NaN and infinity are not
    accepted as numbers.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(
            partial(_refuse_bools_for_numbers, source), handler(source)
        )


class Kind:
    """Mark a union of configs as discriminated by the `kind` field: `Annotated[A | B, Kind()]`.

    Variants that the user imported (`core.plugins`) are members too.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic import Field

        members = _with_outside(_members(source))
        if len(members) < 2:
            return handler(source)
        union = Union[members]  # noqa: UP007 (the members are known at run time)
        return handler.generate_schema(Annotated[union, Field(discriminator="kind")])


def _members(union: Any) -> tuple[Any, ...]:
    """Return the members of a union, without annotations. Any other type is its own member."""
    is_union = get_origin(union) in (Union, types.UnionType)
    return tuple(_bare(member) for member in get_args(union)) if is_union else (union,)


def _with_outside(members: tuple[Any, ...]) -> tuple[Any, ...]:
    configs = tuple(m for m in members if isinstance(m, type) and is_dataclass(m))
    return members + outside_variants(configs)


class _CountReader:
    """Make an int field accept large numbers as people write them: `1e6`, `20k`, `1_000_000`."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(read_count, handler(source))


def _refuse_bools_for_numbers(config_class: Any, data: Any) -> Any:
    """Raise ValueError for a boolean in a number field. Python's `True` is an int, so pydantic
    would read `depth: true` as 1.
    """
    from pydantic_core import InitErrorDetails, ValidationError

    if not isinstance(data, dict):
        return data  # pyright: ignore[reportUnknownVariableType]
    values = cast("dict[str, Any]", data)
    errors = [
        InitErrorDetails(
            type="int_type" if int in members else "float_type", loc=(key,), input=values[key]
        )
        for key, hint in get_type_hints(config_class).items()
        if isinstance(values.get(key), bool)
        and not {bool, Any} & (members := {hint, *get_args(hint)})
        and members & {int, float}
    ]
    if errors:
        raise ValidationError.from_exception_data(config_class.__name__, errors)
    return values


def read_count(value: Any) -> Any:
    """Parse `20k` as 20000 and `1e6` as 1000000. Anything else is returned unchanged, and the
    validator accepts or rejects it.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    match = re.fullmatch(
        r"([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE]\+?[0-9]+)?)\s*([kKmMbBgG]?)", value.strip()
    )
    if not match:
        return value
    number = (
        float(match[1].replace("_", ""))
        * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}[match[2].lower()]
    )
    return int(number) if number.is_integer() else value


Count = Annotated[int, _CountReader()]


class _SizeBounds:
    """Reject tensor sizes that overflow when torch multiplies two of them."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.int_schema(le=2**24)


Size = Annotated[int, _SizeBounds()]
"""Length of one tensor dimension."""


def parse(kind: Any, data: Any, where: str = "") -> Any:
    """Validate plain data as `kind` (any type that pydantic understands).

    A section of a union may leave its `kind` out if it has a default and all its keys are keys of
    the default: `optim: {matrices: {lr: 0.01}}`.

    Raise UserError with one line: where, the key, what is wrong, and the closest known name for an
    unknown one.
    """
    from pydantic import ValidationError

    try:
        data = _with_default_kinds(kind, data)
        return _adapter(kind, imported_variants()).validate_python(data)
    except ValidationError as error:
        problem = sorted(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")[
            0
        ]
        raise UserError(_explain(kind, problem, where)) from None


def variant_of(union: Any, kind: Any) -> Any:
    """Return the config class of a union with this `kind`, or None. Imported variants count."""
    members = _with_outside(_members(_bare(union)))
    return next((m for m in members if is_dataclass(m) and _tag(m) == kind), None)


def _with_default_kinds(kind: Any, data: Any) -> Any:
    """Add the `kind` of the default to sections that leave it out."""
    kind = _bare(kind)
    if isinstance(data, list | tuple) and get_origin(kind) is tuple:
        items = cast("list[Any]", data)
        return [_with_default_kinds(get_args(kind)[0], item) for item in items]
    members = [m for m in _with_outside(_members(kind)) if is_dataclass(m)]
    if not isinstance(data, dict):
        return cast("Any", data)
    sections = cast("dict[str, Any]", data)
    if len(members) > 1:
        members = [m for m in members if _tag(m) == sections.get("kind")]
    if len(members) != 1:
        return sections
    hints = get_type_hints(members[0], include_extras=True)
    return {key: _section(members[0], key, hints, value) for key, value in sections.items()}


def _section(owner: Any, key: str, hints: dict[str, Any], value: Any) -> Any:
    default = next((field.default for field in fields(owner) if field.name == key), None)
    if isinstance(value, dict) and "kind" not in value and is_dataclass(default):
        section = cast("dict[str, Any]", value)
        names = {field.name for field in fields(default)}
        if "kind" in names and names.issuperset(section):
            value = {"kind": getattr(default, "kind", None)} | section
    return _with_default_kinds(hints.get(key, Any), value)


@lru_cache(maxsize=64)
def _adapter(kind: Any, imported: tuple[type, ...]) -> Any:
    """Return pydantic's adapter of a type, whose unions contain the `imported` variants."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def json_schema(kind: Any) -> dict[str, Any]:
    """Return the JSON schema of a config type, for editors."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind).json_schema()


def to_plain(config: Any) -> Any:
    """Convert a config to dicts, lists and scalars. This is the inverse of `parse`."""
    if is_dataclass(config):
        return {f.name: to_plain(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, tuple | list):
        return [to_plain(item) for item in cast("list[Any]", config)]
    if isinstance(config, dict):
        return {key: to_plain(value) for key, value in cast("dict[str, Any]", config).items()}
    return config


def did_you_mean(name: str, names: list[str]) -> str:
    """Return `. Did you mean 'x'?` for the closest of `names`, or an empty string."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.65)
    return f". Did you mean '{close[0]}'?" if close else ""


def _explain(kind: Any, problem: Any, where: str) -> str:
    keys, owner, expected_type = _walk(kind, problem["loc"])
    location = ": ".join(part for part in (where, ".".join(str(key) for key in keys)) if part)
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [f.name for f in fields(owner)] if owner else []
        if (new := new_key(str(keys[-1]), known)) is not None:
            return f"{location}: `{keys[-1]}` is now `{new}`"
        return f"{location}: unknown key{did_you_mean(str(keys[-1]), known) or _known_names(known)}"
    if problem["type"] == "missing":
        return f"{location}: required key is missing"
    if problem["type"] == "union_tag_invalid":
        expected = problem["ctx"]["expected_tags"].replace("'", "").split(", ")
        tag = problem["ctx"]["tag"]
        if (new := new_kind(tag, expected)) is not None:
            return f"{location}.kind: `{tag}` is now `{new}`"
        hint = did_you_mean(tag, expected) or "; name the file of a kind of your own with --import"
        return f"{location}.kind: '{tag}' is not one of {', '.join(expected)}{hint}"
    if problem["type"] == "union_tag_not_found":
        known = [str(_tag(_bare(member))) for member in get_args(_bare(expected_type))]
        return f"{location}: needs a `kind`{_known_names(known)}"
    if problem["type"] == "literal_error":
        expected = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        if (new := new_kind(problem["input"], expected)) is not None:
            return f"{location}: `{problem['input']}` is now `{new}`"
    kinds = [_tag(m) for m in _with_outside(_members(_bare(expected_type))) if is_dataclass(m)]
    if isinstance(problem["input"], str) and problem["input"] in kinds:
        return f"{location}: write {{kind: {problem['input']}}}"
    message = problem["msg"].removeprefix("Value error, ").replace("\n", " ")
    message = _SHAPES.get(problem["type"], message)
    value = problem["input"]
    suffix = f" (got {value!r})" if isinstance(value, str | int | float | bool | None) else ""
    return f"{location}: {message}{'' if problem['type'] == 'value_error' else suffix}"


_SHAPES = {
    **dict.fromkeys(("tuple_type", "list_type"), "must be a list, [...]"),
    **dict.fromkeys(
        ("model_attributes_type", "dataclass_type", "dict_type"), "must be keys and values, {...}"
    ),
}
"""Message about the expected YAML, by error type of pydantic."""


def _known_names(names: list[str]) -> str:
    return f" (known: {', '.join(names)})" if names else ""


def _walk(kind: Any, location: tuple[Any, ...]) -> tuple[list[Any], Any, Any]:
    """Return the user's keys without pydantic's union tags, the dataclass that owns the last key,
    and the expected type at that key.
    """
    keys: list[Any] = []
    owner = None
    for step in location:
        kind = _bare(kind)
        if get_origin(kind) in (Union, types.UnionType):
            members = [m for m in _with_outside(_members(kind)) if m is not type(None)]
            tagged = [m for m in members if is_dataclass(m) and _tag(m) == step]
            named = [m for m in members if getattr(m, "__name__", None) == step or str(m) == step]
            if tagged or named:
                kind = (tagged or named)[0]
                continue
            kind = next(
                (m for m in members if is_dataclass(m) and step in {f.name for f in fields(m)}),
                members[0],
            )
            kind = _bare(kind)
        if is_dataclass(kind):
            owner = kind
            keys.append(step)
            kind = get_type_hints(kind, include_extras=True).get(str(step), Any)
        elif get_args(kind):
            if isinstance(step, int) or get_origin(kind) is dict:
                keys.append(step)
                arguments = [a for a in get_args(kind) if a is not Ellipsis]
                kind = arguments[-1]
        else:
            keys.append(step)
    return keys, owner, kind


def _bare(kind: Any) -> Any:
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return kind


def _tag(kind: Any) -> Any:
    for field in fields(kind):
        if field.name == "kind":
            return field.default
    return None

"""`tinsmith config`: show, check and compare recipes."""

import json
from pathlib import Path
from typing import Any

from tinsmith.config import load
from tinsmith.config import schema as make_schema
from tinsmith.core.log import print_line
from tinsmith.core.parse import read_yaml, to_plain
from tinsmith.nn.config import with_preset


def show(recipe: Path, overrides: list[str], more: list[Path]) -> None:
    """Print every key of the resolved recipe with the origin of values that are not defaults."""
    resolved = flat(to_plain(load(recipe, overrides, more)))
    origins = _origins(recipe, overrides, more)
    for key, value in resolved.items():
        origin = origins.get(key)
        line = f"{key}: {value!r}"
        print_line(f"{line:<60} # {origin}" if origin else line)


def check(recipe: Path, overrides: list[str], more: list[Path]) -> None:
    """Print `ok`, or raise UserError."""
    load(recipe, overrides, more)
    print_line("ok")


def schema() -> None:
    """Print the JSON schema of a recipe."""
    print_line(json.dumps(make_schema(), indent=1))


def diff(left: Path, right: Path) -> None:
    """Print the keys in which two recipes differ, as `key: left -> right`."""
    one, two = flat(to_plain(load(left))), flat(to_plain(load(right)))
    for key in sorted(one.keys() | two.keys()):
        if one.get(key) != two.get(key):
            print_line(f"{key}: {one.get(key)!r} -> {two.get(key)!r}")


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a tree to `a.b.0.c` -> leaf."""
    items = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else None
    )
    if items is None or not data:
        return {prefix: data}
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def _origins(recipe: Path, overrides: list[str], more: list[Path]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in [recipe, *more]:
        data = read_yaml(path)
        model = data.get("model")
        if isinstance(model, dict) and "preset" in model:
            found |= {
                f"model.{key}": f"preset {model['preset']}"
                for key in flat(with_preset({"preset": model["preset"]}))
            }
        if isinstance(data.get("data"), dict):
            data = data | {"data": [data["data"]]}
        found |= {key: str(path) for key in flat(data)}
    single = isinstance(read_yaml(recipe).get("data"), dict)
    for override in overrides:
        key = override.partition("=")[0]
        found[key.replace("data.", "data.0.", 1) if single else key] = "command line"
    return found

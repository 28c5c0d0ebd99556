"""Variants from outside: a mixer, feed-forward, residual, objective or reward in a user's own file.

    tinsmith train recipe.yaml --import my_mixer.py

`import_variants` runs the file and collects its config dataclasses that have a `kind`. Each joins
the unions (`core.parse.Kind`) whose members share its base class, such as `MixerConfigBase`. Only
files that the user names on the command line or in a recipe are imported, never files of a
downloaded or exported folder.
"""

import importlib.util
import sys
import traceback
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from tinsmith.core.errors import UserError

_IMPORTED: dict[Path, list[type]] = {}


def import_variants(path: Path) -> list[type]:
    """Import a user's Python file and register its variants. Return their config classes.

    A file is imported once per process. Raise UserError with file and line if it is missing, fails,
    or defines no variant.
    """
    path = path.expanduser().resolve()
    if path in _IMPORTED:
        return _IMPORTED[path]
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"--import {path}: no such Python file")
    name = f"tinsmith_import_{len(_IMPORTED)}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and type hints look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # any exception of the user's code
        del sys.modules[name]
        raise UserError(f"{_line_of(error, path)}: {type(error).__name__}: {error}") from error
    variants = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == name and kind_of(value)
    ]
    if not variants:
        raise UserError(f"--import {path}: defines no config dataclass with a `kind`")
    _IMPORTED[path] = variants
    return variants


def imported_files() -> list[Path]:
    """Return the user's files that were imported, in that order."""
    return list(_IMPORTED)


def imported_variants() -> tuple[type, ...]:
    """Return the config classes of all imported files."""
    return tuple(variant for variants in _IMPORTED.values() for variant in variants)


def kind_of(variant: type) -> str | None:
    """Return the `kind` of a config dataclass, or None if it has none."""
    if not is_dataclass(variant):
        return None
    default = next((field.default for field in fields(variant) if field.name == "kind"), None)
    return default if isinstance(default, str) else None


def outside_variants(members: tuple[type, ...]) -> tuple[type, ...]:
    """Return the imported variants that share the base class of a union's `members`.

    Raise UserError if one has the `kind` of a member or of another imported variant.
    """
    base = _common_base(members)
    if base is None:
        return ()
    homes = {kind_of(member): "Tinsmith" for member in members}
    outside: list[type] = []
    for path, variants in _IMPORTED.items():
        for variant in variants:
            if issubclass(variant, base):
                kind = kind_of(variant)
                if kind in homes:
                    raise UserError(f"{path}: kind '{kind}' is already defined by {homes[kind]}")
                homes[kind] = str(path)
                outside.append(variant)
    return tuple(outside)


def _common_base(members: tuple[type, ...]) -> type | None:
    """Return the most derived base class of all members that declares `build`, or None."""
    for base in members[0].__mro__ if members else ():
        if all(issubclass(member, base) for member in members) and hasattr(base, "build"):
            return base if base not in members or len(members) > 1 else base.__mro__[1]
    return None


def _line_of(error: BaseException, path: Path) -> str:
    """Return `file:line` of the error in the user's file."""
    if isinstance(error, SyntaxError):
        return f"{path}:{error.lineno}"
    frames: Any = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path]
    return f"{path}:{lines[-1]}" if lines else str(path)

"""Checkpoint manifests: `manifest.json` lists every file of a checkpoint and is written last.

    {"schema": 1, "version": "0.1.0", "files": {NAME: {"bytes": N, "sha256": HEX}}, ...}

A folder is never loaded if its manifest is missing, unreadable or differs from its files.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from tinsmith import __version__
from tinsmith.core.errors import UserError
from tinsmith.core.files import atomic_write, inside, sha256
from tinsmith.core.jsonfile import read_object

MANIFEST = "manifest.json"
SCHEMA = 1
_STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """Return the folder name of the checkpoint of a step, such as `step-00000400`."""
    return f"step-{step:08d}"


def write_manifest(folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Write `manifest.json` with the size and SHA-256 of every file below `folder`.

    `extra` is added at the top level. Its keys must differ from the manifest's own.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in paths
    }
    own = {"schema": SCHEMA, "version": __version__, "files": files}
    assert not own.keys() & (extra or {}).keys()
    atomic_write(folder / MANIFEST, json.dumps(own | (extra or {}), indent=2) + "\n")


def verify(folder: Path, hashes: bool = False, required: Sequence[str] = ()) -> str | None:
    """Compare `folder` with its manifest. Return None if they agree, else the reason in one line.

    File sizes are always compared, SHA-256 sums only with `hashes`. `required` names files that the
    manifest must list.
    """
    try:
        files = _read_entries(folder)
        for name in required:
            if name not in files:
                raise UserError(f"{MANIFEST} does not list {name}")
        for name, entry in files.items():
            _compare(folder, name, entry, hashes)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None


def newest_valid(
    checkpoints: Path, hashes: bool = True, required: Sequence[str] = ()
) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that passes `verify`, and the reasons why newer ones failed.

    Only folders named by `step_name` count.
    """
    skipped: list[str] = []
    for folder in steps(checkpoints):
        reason = verify(folder, hashes, required)
        if reason is None:
            return folder, skipped
        skipped.append(f"{folder.name}: {reason}")
    return None, skipped


def steps(checkpoints: Path) -> list[Path]:
    """Return all checkpoint folders, newest step first, valid or not."""
    if not checkpoints.is_dir():
        return []
    numbered = [
        (int(match[1]), path)
        for path in checkpoints.iterdir()
        if (match := _STEP.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def _read_entries(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{MANIFEST} is missing (saving was interrupted)")
    try:
        manifest = read_object(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), MANIFEST)) from None
    if manifest.get("schema") != SCHEMA:
        schema = manifest.get("schema")
        raise UserError(f"{MANIFEST} has schema {schema!r}, and this version reads {SCHEMA}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{MANIFEST} lists no files")
    entries = cast("dict[str, Any]", files)
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise UserError(f"{MANIFEST} has no size and SHA-256 for {name}")
        fields = cast("dict[str, Any]", entry)
        if type(fields.get("bytes")) is not int or not isinstance(fields.get("sha256"), str):
            raise UserError(f"{MANIFEST} has no size and SHA-256 for {name}")
    return entries


def _compare(folder: Path, name: str, entry: dict[str, Any], hashes: bool) -> None:
    path = inside(folder, name)
    if not path.is_file():
        raise UserError(f"{name} is missing")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise UserError(f"{name} has {size} bytes instead of {entry['bytes']}")
    if hashes and sha256(path) != entry["sha256"]:
        raise UserError(f"{name} was changed after saving (its SHA-256 differs)")

"""A prepared folder: found, opened and described."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.core.units import count
from tinsmith.data.shards import Shards
from tinsmith.text.tokenizer import Tokenizer

Say = Callable[[str], None]


class Prepared(NamedTuple):
    """Data ready for training: the folder with the shards, its tokenizer, and the counts of `report.json`."""

    folder: Path
    tokenizer: Tokenizer
    report: dict[str, Any]


def open_prepared(folder: Path, *, verify: bool = False) -> Prepared:
    """Open a prepared folder, checking the sizes of its shards (with `verify`, their hashes)."""
    report = read_report(folder)
    for number in range(len(report["sources"])):
        for part in ("train", "validation"):
            Shards.open(folder / str(number) / part, verify=verify)
    return Prepared(folder, Tokenizer.load(folder), report)


def read_report(folder: Path) -> dict[str, Any]:
    """The counts of a prepared folder."""
    path = folder / "report.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); delete {folder} and run `tinsmith prepare` again"
        ) from None


def find_prepared(folder: Path, say: Say) -> Prepared | None:
    """The folder, if it is there and its sizes are right; otherwise nothing."""
    if not folder.exists():
        return None
    try:
        prepared = open_prepared(folder)
    except UserError as error:
        say(f" prepare   {folder} is damaged, so it is made again ({error})")
        return None
    say(f" prepare   found {folder}")
    return prepared


def summarise(prepared: Prepared, say: Say) -> None:
    """One line per source: how much there is, and how much could not be used."""
    for source in prepared.report["sources"]:
        parts = [source["train"], source["validation"]]
        documents, tokens, text_bytes = (
            sum(part[key] for part in parts) for key in ("documents", "tokens", "bytes")
        )
        rejected = source["rejected"]
        bad = (
            f", {rejected} lines rejected ({prepared.folder / 'rejects.jsonl'})" if rejected else ""
        )
        say(
            f" prepare   {source['name']}: {count(documents)} {prepared.report['shape']}, {count(tokens)} tokens, "
            f"{text_bytes / tokens:.2f} B/token{bad}"
        )
        if not source["validation"]["documents"]:
            say(f" prepare   {source['name']}: nothing is held back for validation")

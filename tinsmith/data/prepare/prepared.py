"""Find, open and summarise a prepared folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.core.units import format_count
from tinsmith.data.formats import FORMATS
from tinsmith.data.formats.prompts import METADATA_DIR
from tinsmith.data.prepare.shards import Shards
from tinsmith.text.tokenizer import Tokenizer

Say = Callable[[str], None]


class PreparedData(NamedTuple):
    """Data ready for training: the folder with the shards, its tokenizer, and the counts of
    `report.json`."""

    folder: Path
    tokenizer: Tokenizer
    report: dict[str, Any]


def open_prepared(folder: Path, *, verify: bool = False) -> PreparedData:
    """Open a prepared folder and check the sizes of its shards (with `verify`, also the hashes)."""
    report = read_report(folder)
    for source_index in range(len(report["sources"])):
        for split in ("train", "validation"):
            shards = folder / str(source_index) / split
            Shards.open(shards, verify=verify)
            if FORMATS[report["data_format"]].has_metadata:
                Shards.open(shards / METADATA_DIR, verify=verify)
    return PreparedData(folder, Tokenizer.load(folder), report)


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report of a prepared folder. Raise UserError if it cannot be read."""
    path = folder / "report.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); delete {folder} and run `tinsmith prepare` again"
        ) from None


def find_prepared(folder: Path, say: Say) -> PreparedData | None:
    """Open a prepared folder. Return None if it does not exist or is damaged."""
    if not folder.exists():
        return None
    try:
        prepared = open_prepared(folder)
    except UserError as error:
        say(f" prepare   {folder} is damaged and is prepared again ({error})")
        return None
    say(f" prepare   found {folder}")
    return prepared


def summarise(prepared: PreparedData, say: Say) -> None:
    """Print the counts of every source, one line each."""
    data_format, rejects = prepared.report["data_format"], prepared.folder / "rejects.jsonl"
    for source in prepared.report["sources"]:
        name, rejected, validation = source["name"], source["rejected"], source["validation"]
        total = {key: source["train"][key] + validation[key] for key in validation}
        parts = [
            f"{format_count(total['documents'])} {data_format}",
            f"{format_count(total['tokens'])} tokens",
            f"{total['bytes'] / total['tokens']:.2f} B/token",
        ]
        if rejected:
            share = rejected / (rejected + total["documents"])
            reason = next(iter(source["reject_reasons"]))
            parts.append(
                f"{rejected} lines rejected ({share:.0%}; most often: {reason}; see {rejects})"
            )
        if not validation["documents"]:
            parts.append("nothing held back for validation")
        say(f" prepare   {name}: {', '.join(parts)}")
        if rejected > total["documents"]:
            say(f" warning {name}: more than half of the records are rejected")
        if source["never_read"]:
            fields = [f"{field} ({count:,} rows)" for field, count in source["never_read"].items()]
            say(f" prepare   {name}: fields never read: {', '.join(fields)}")

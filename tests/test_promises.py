"""docs/promises.md and the tests that carry a promise's id agree."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SELF = "tests/test_promises.py"


def carried() -> set[tuple[str, str]]:
    """(id, file) of every test with an id in its name."""
    pairs = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        name = path.relative_to(ROOT).as_posix()
        for ids in re.findall(r"def test_((?:[A-Z]+\d+_)+)", path.read_text(encoding="utf-8")):
            pairs |= {(each, name) for each in re.findall(r"[A-Z]+\d+", ids)}
    return pairs


def promised() -> set[tuple[str, str]]:
    """(id, file) of every row of the page."""
    text = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-Z]+\d+) \| (.+) \| (.+) \|$", text, re.M)
    assert all(promise.endswith(".") for _, promise, _ in rows)
    return {(each, name) for each, _, files in rows for name in re.findall(r"`([^`]+)`", files)}


def test_every_id_that_a_test_carries_is_on_the_page_and_the_other_way_round():
    assert len(carried()) > 100
    assert carried() - promised() == set()
    assert promised() - carried() == set()

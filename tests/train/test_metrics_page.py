"""docs/metrics.md lists every metric that the code logs, and no other."""

import ast
import re

import pytest


@pytest.fixture(scope="module")
def page(root):
    text = (root / "docs" / "metrics.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`[^|]*`) \|", text, re.M)
    return text, {key for cell in cells for key in re.findall(r"`([\w.]+)`", cell)}


def strings_and_metrics(root):
    """Return every string of the library, and the keys whose value is a `Metric`."""
    strings, metrics = set(), set()
    for path in (root / "tinsmith").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.add(node.value)
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    called = value.func if isinstance(value, ast.Call) else None
                    if isinstance(called, ast.Name) and called.id == "Metric":
                        assert isinstance(key, ast.Constant)
                        metrics.add(key.value)
    return strings, metrics


def test_every_metric_of_an_objective_is_on_the_page(root, page):
    _, metrics = strings_and_metrics(root)
    assert len(metrics) > 15
    assert not metrics - page[1]


def test_every_key_on_the_page_is_in_the_code(root, page):
    strings, _ = strings_and_metrics(root)
    known = strings | {f"{key}.NAME" for key in ("accuracy", "bpb")}
    assert not page[1] - known


def test_keys_of_training_and_routing_records_are_on_the_page(root, page):
    hooks = (root / "tinsmith" / "train" / "hooks.py").read_text(encoding="utf-8")
    logged = set(re.findall(r'"(\w+)": run\.|"(\w+)": (?:rate|speed|left)', hooks))
    keys = {key for pair in logged for key in pair if key} - {"step", "kind"}
    assert {"tokens", "lr_multiplier", "eta_seconds"} <= keys
    assert not keys - page[1]
    stats = (root / "tinsmith" / "train" / "expert_stats.py").read_text(encoding="utf-8")
    described = set(re.findall(r"^\| (\w+) \|", stats, re.M)) - {"name", "others"}
    assert described <= page[1]


def test_every_kind_of_record_is_on_the_page(root, page):
    hooks = (root / "tinsmith" / "train" / "hooks.py").read_text(encoding="utf-8")
    for kind in set(re.findall(r'"kind": "(\w+)"', hooks)):
        assert f"kind: {kind}" in page[0] or f"| `{kind}` |" in page[0], kind

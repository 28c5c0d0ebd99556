"""Variants in a user's own file are added to the config unions."""

import textwrap

import pytest

from tinsmith.core import plugins
from tinsmith.core.errors import UserError
from tinsmith.core.parse import json_schema, parse
from tinsmith.core.plugins import import_variants
from tinsmith.nn.config import ModelConfig

HALF = """
    from dataclasses import dataclass
    from typing import Literal

    from tinsmith.nn.contract import FeedForward, FeedForwardConfigBase, Out


    @dataclass(frozen=True, kw_only=True)
    class Half(FeedForwardConfigBase):
        kind: Literal["half"] = "half"
        factor: float = 0.5

        def build(self, build_ctx):
            return HalfFeedForward(self.factor)


    class HalfFeedForward(FeedForward):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x, ctx):
            return Out(self.factor * x)

        def flops(self):
            return 0
"""


@pytest.fixture(autouse=True)
def no_imported_variants(monkeypatch):
    """Remove imported variants after each test."""
    monkeypatch.setattr(plugins, "_IMPORTED", {})


@pytest.fixture
def write(tmp_path):
    def file(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return file


def model(feed_forward):
    sizes = {"vocab_size": 8, "dim": 8, "depth": 1, "max_seq_len": 8}
    layer = {"mixer": {"kind": "gqa", "heads": 2}, "feed_forward": feed_forward}
    return sizes | {"pattern": [layer]}


def test_an_imported_kind_is_parsed_built_and_in_the_schema(write):
    with pytest.raises(UserError, match=r"'half' is not one of .*--import"):
        parse(ModelConfig, model({"kind": "half"}))
    (variant,) = import_variants(write(HALF))
    config = parse(ModelConfig, model({"kind": "half", "factor": 0.25}))
    assert type(config.pattern[0].feed_forward) is variant
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert "half" in str(json_schema(ModelConfig))


def test_an_imported_kind_is_in_no_other_slot(write):
    import_variants(write(HALF))
    section = model({"kind": "half"})
    section["pattern"][0]["mixer"] = {"kind": "half"}
    with pytest.raises(UserError, match=r"mixer\.kind: 'half' is not one of"):
        parse(ModelConfig, section)


def test_keys_of_an_imported_kind_are_checked(write):
    import_variants(write(HALF))
    with pytest.raises(UserError, match=r"feed_forward\.facto: unknown key. Did you mean 'factor'"):
        parse(ModelConfig, model({"kind": "half", "facto": 1.0}))


def test_a_file_is_imported_once(write):
    path = write(HALF)
    assert import_variants(path) is import_variants(path)


def test_a_kind_that_exists_is_refused(write):
    import_variants(write(HALF.replace('"half"', '"swiglu"')))
    with pytest.raises(UserError, match="kind 'swiglu' is already defined by Tinsmith"):
        parse(ModelConfig, model({"kind": "swiglu", "hidden_dim": 8}))


def test_two_files_with_the_same_kind_are_refused(write):
    import_variants(write(HALF))
    import_variants(write(HALF, "other.py"))
    with pytest.raises(UserError, match=r"other\.py: kind 'half' is already defined by .*mine\.py"):
        parse(ModelConfig, model({"kind": "half"}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nraise ValueError('no')", r"mine\.py:2: ValueError: no"),
        ("x = (\n", r"mine\.py:1: SyntaxError"),
        ("import no_such_module_anywhere", r"mine\.py:1: ModuleNotFoundError"),
        ("x = 1", "defines no config dataclass with a `kind`"),
    ],
)
def test_a_file_that_fails_is_named_with_its_line(write, text, message):
    with pytest.raises(UserError, match=message):
        import_variants(write(text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.py: no such Python file"):
        import_variants(tmp_path / "absent.py")

"""YAML files: duplicate keys, numbers, and one line for everything that cannot be read."""

import os

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.config import load
from tinsmith.core.errors import UserError
from tinsmith.core.yamlfile import parse_yaml, read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train: {steps: 1}\ndata: 2\ntrain: {seed: 3}\n", 3),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", 4),
        ("- {x: 1,\n   x: 1}\n", 2),
        ("'a': 1\na: 2\n", 2),
    ],
)
def test_D18_a_key_that_occurs_twice_is_refused_with_its_line(tmp_path, text, line):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"recipe\.yaml:{line}: .*'\w+' occurs twice$"):
        read_yaml(path)


def test_merge_keys_may_be_overridden():
    text = "base: &base {lr: 1, steps: 2}\nown:\n  <<: *base\n  lr: 3\nagain:\n  <<: *base\n"
    parsed = parse_yaml(text, "x")
    assert (parsed["own"], parsed["again"]) == ({"lr": 3, "steps": 2}, {"lr": 1, "steps": 2})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0123", 123),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("2024-01-31", "2024-01-31"),
        ("2024-99-99", "2024-99-99"),
        ("0x10", 16),
        ("1_000", 1000),
        ("-7", -7),
        ("1.5e-3", 0.0015),
        ("true", True),
        ("9223372036854775807", 2**63 - 1),
        ("[1, 'a', null]", [1, "a", None]),
    ],
)
def test_D18_numbers_are_decimal_and_dates_are_text(text, value):
    assert parse_yaml(text, "x") == value


@pytest.mark.parametrize(
    "text",
    [
        *("!!int sort", "!!float x", "!!timestamp [1]", "!!python/object/apply:os.system [ls]"),
        *("0x_", "9" * 5000, "9223372036854775808", "-9223372036854775809", "[" * 5000),
        *("{a: 1", "a: b: c", "!!set 5", "!!omap 3", "? [1]\n: 2", "!!binary x", "\x00", "*nobody"),
        *("!!bool maybe", "!!null x: [", "{[1]: 2}", "<<: 3", "!!pairs x", "%YAML 9\n---\nx"),
    ],
)
@pytest.mark.parametrize("where", ["file", "override"])
def test_R4_values_that_yaml_cannot_build_are_one_line(tmp_path, text, where):
    path = tmp_path / "recipe.yaml"
    written = f"train:\n  seed: {text}\n" if where == "file" else "train: {}\n"
    path.write_text(written, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load(path, [] if where == "file" else [f"train.seed={text}"])
    assert "\n" not in str(error.value)


def test_R4_a_named_pipe_and_a_folder_are_no_recipes(tmp_path):
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(UserError, match=r"not a file$"):
            read_yaml(path)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(plain)
def test_what_is_written_reads_back_equal(data):
    assert parse_yaml(write_yaml(data), "x") == data


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.text(alphabet="abn:{}[],'\"\n -!&*?|>%@`#~<.0123eExf_", max_size=30))
def test_R4_any_text_is_parsed_or_refused_in_one_line(text):
    message = ""
    try:
        yaml.safe_dump(parse_yaml(text, "x"))
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert message.startswith("x" if message else "")

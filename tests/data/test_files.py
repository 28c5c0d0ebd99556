import csv
import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinsmith.core.errors import UserError
from tinsmith.data import files
from tinsmith.data.files import Reject, find_files, get_text, read_records, read_texts


def records_of(path):
    """(line, record or reason) of every record."""
    return [(r.line, r.reason if isinstance(r, Reject) else r.data) for r in read_records(path)]


def texts_of(path):
    return [(t.line, t.reason if isinstance(t, Reject) else t.text) for t in read_texts(path)]


GOOD = {"text": "fine"}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"text": "\xff\xfe"}', "not UTF-8 (byte 11 of the line)"),
        (b'{"text": "x"', "not JSON: Expecting ',' delimiter (column 13)"),
        (b'{"text": "\x00"}', "not JSON: Invalid control character at (column 11)"),
        (b'["text"]', "not an object but a list"),
        (b'"text"', "not an object but text"),
        (b"null", "not an object but null"),
        (b"17", "not an object but a number"),
        (b"[" * 100_000, "not usable JSON: nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not usable JSON: a number of too many digits"),
    ],
)
def test_T9_a_bad_json_line_is_rejected_with_its_reason(write_lines, bad, reason):
    assert records_of(write_lines("x.jsonl", [GOOD, bad, GOOD])) == [
        (1, GOOD),
        (2, reason),
        (3, GOOD),
    ]


def test_T9_a_line_above_the_limit_is_rejected_and_the_next_one_read(write_lines):
    long = {"text": "x" * files.MAX_LINE_BYTES}
    records = records_of(write_lines("x.jsonl", [GOOD, long, GOOD]))
    assert records == [(1, GOOD), (2, "longer than 10 MB"), (3, GOOD)]


@pytest.mark.parametrize("extra", [-1, 0, 1, 2])
def test_T9_the_longest_line_allowed_is_exactly_the_limit(tmp_path, monkeypatch, extra):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 40)
    raw = json.dumps({"text": "x" * (40 - 12 + extra)}).encode()
    assert len(raw) == 40 + extra
    for end in (b"\n", b"\r\n", b""):
        path = tmp_path / "x.jsonl"
        path.write_bytes(raw + end)
        assert isinstance(records_of(path)[0][1], dict) == (extra <= 0)


def test_T9_a_byte_order_mark_at_the_start_is_accepted(write_lines):
    assert records_of(write_lines("x.jsonl", [GOOD], start=b"\xef\xbb\xbf")) == [(1, GOOD)]
    assert texts_of(write_lines("x.txt", [b"fine"], start=b"\xef\xbb\xbf")) == [(1, "fine\n")]


def test_T9_crlf_line_ends_are_accepted(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "fine"}\r\n\r\n{"text": "fine"}\r\n')
    (tmp_path / "x.txt").write_bytes(b"a\r\nb\r\n<|endoftext|>\r\nc\r\n")
    assert records_of(tmp_path / "x.jsonl") == [(1, GOOD), (3, GOOD)]
    assert texts_of(tmp_path / "x.txt") == [(1, "a\nb\n"), (4, "c\n")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"texts": "x", "n": 1}, "no field 'text' (it has texts, n)"),
        ({}, "no field 'text' (it has none)"),
        ({"text": ["x"]}, "field 'text' is a list, not text"),
        ({"text": None}, "field 'text' is null, not text"),
        ({"text": ""}, "field 'text' is empty"),
        ({"text": " \n\t"}, "field 'text' is empty"),
        ({"text": "a\0b"}, "holds a NUL character"),
        ({"text": "\ud800"}, "holds a lone surrogate, which is no character"),
    ],
)
def test_T9_a_record_without_usable_text_is_rejected_with_its_reason(record, reason):
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        get_text(record, "text")


def test_T9_bad_lines_of_a_text_file_are_rejected(write_lines):
    texts = texts_of(write_lines("x.txt", [b"one", b"\xff\xfe", b"t\x00wo", b"three"]))
    assert texts == [(2, "not UTF-8"), (3, "holds a NUL character"), (1, "one\nthree\n")]


def test_T9_a_bad_part_of_a_very_long_line_does_not_affect_the_next_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_CHARS", 4)
    (tmp_path / "x.txt").write_bytes(b"ab\xe4\xb8\xffcd\ngood\n")
    items = list(read_texts(tmp_path / "x.txt"))
    assert [(item.line, item.reason) for item in items if isinstance(item, Reject)] == [
        (1, "not UTF-8")
    ]
    assert "".join(item.text for item in items if not isinstance(item, Reject)) == "abgood\n"


@pytest.mark.parametrize("start", [b"", b"a", b"ab"])
def test_T9_an_incomplete_character_at_the_end_of_a_file_is_rejected(tmp_path, monkeypatch, start):
    monkeypatch.setattr(files, "CHUNK_CHARS", 4)
    (tmp_path / "x.txt").write_bytes(start + b"\xe4\xb8")
    assert [(item.line, item.reason) for item in read_texts(tmp_path / "x.txt")] == [
        (1, "not UTF-8")
    ]


def test_T9_the_records_before_the_damage_of_a_gzip_file_are_read(tmp_path):
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(50_000))
    raw = gzip.compress(lines)
    (tmp_path / "x.jsonl.gz").write_bytes(raw[: len(raw) // 2])
    records = list(read_records(tmp_path / "x.jsonl.gz"))
    assert len(records) > 100
    assert records[-1].reason == "the compressed file is damaged or cut off from here on"
    assert records[-1].line == len(records)
    (tmp_path / "y.jsonl.gz").write_bytes(b"not gzip at all")
    assert [r.line for r in read_records(tmp_path / "y.jsonl.gz")] == [1]


def test_T9_line_numbers_of_gzip_and_plain_files_are_equal(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n\n{\n'))
    assert records_of(tmp_path / "x.jsonl.gz")[-1][0] == 3


@given(st.binary(max_size=200))
@settings(
    derandomize=True,
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_T9_arbitrary_bytes_are_read_or_rejected(tmp_path, raw):
    for name in ("x.jsonl", "x.txt", "x.jsonl.gz"):
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(raw))
    lines = raw.count(b"\n") + 1
    for name in ("x.jsonl", "x.jsonl.gz", "y.jsonl.gz"):
        assert all(1 <= item.line <= lines for item in read_records(tmp_path / name))
    for item in read_texts(tmp_path / "x.txt"):
        assert 1 <= item.line <= lines
        assert isinstance(item, Reject) or "\0" not in item.text


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=300),
    st.integers(1, 20),
)
@settings(
    derandomize=True,
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_the_pieces_of_a_text_file_join_to_its_text(tmp_path, text, chunk_chars):
    text = text.removeprefix("\ufeff")
    (tmp_path / "x.txt").write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_CHARS", chunk_chars)
        pieces = list(read_texts(tmp_path / "x.txt"))
    if text.strip():
        assert "".join(item.text for item in pieces) == text
        assert [item.first for item in pieces] == [True] + [False] * (len(pieces) - 1)
        assert [item.last for item in pieces] == [False] * (len(pieces) - 1) + [True]
    else:
        assert "".join(item.text for item in pieces).strip() == ""


def test_a_text_file_is_split_at_end_of_text_lines(write_lines):
    lines = [
        b"one",
        b"<|endoftext|>",
        b"<|endoftext|>",
        b"",
        b"<|endoftext|>",
        b"two",
        b"2",
        b" <|endoftext|> ",
    ]
    assert texts_of(write_lines("x.txt", lines)) == [(1, "one\n"), (6, "two\n2\n")]


def write_parquet(path, records):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def test_rows_of_a_parquet_file_are_counted_from_one(tmp_path):
    records = [{"text": str(i), "other": i} for i in range(600)]
    path = write_parquet(tmp_path / "x.parquet", records)
    rows = list(read_records(path, ["text"]))
    assert [row.line for row in rows] == list(range(1, 601))
    assert [row.data for row in rows] == [{"text": str(i)} for i in range(600)]


def test_T9_an_invalid_parquet_file_or_a_missing_column_is_a_one_line_error(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match=r"x\.parquet: not a readable parquet file"):
        list(read_records(tmp_path / "x.parquet"))
    path = write_parquet(tmp_path / "y.parquet", [{"body": "x"}])
    with pytest.raises(UserError, match=r"no column 'text' \(it has body\); set data\.field"):
        list(read_records(path, ["text"]))


def test_all_known_files_of_a_folder_are_found_in_order(tmp_path):
    for name in (
        "b/2.txt",
        "b/1.jsonl",
        "a.parquet",
        "c.jsonl.gz",
        "NOTICE",
        "d.md",
        ".hidden/e.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in find_files(str(tmp_path))] == [
        *("a.parquet", "b/1.jsonl", "b/2.txt", "c.jsonl.gz")
    ]


def test_an_unusable_path_is_a_one_line_error_with_advice(tmp_path):
    (tmp_path / "stories.txt").touch()
    (tmp_path / "table.xlsx").touch()
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("storys.txt", r"data\.path: .*storys\.txt does not exist\. Did you mean 'stories\.txt'\?"),
        ("table.xlsx", r"not of a known kind; use \.txt, \.jsonl, \.jsonl\.gz, .*\.parquet"),
        ("empty", r"no \.txt, \.jsonl, \.jsonl\.gz, .*\.parquet file in the folder"),
    ]:
        with pytest.raises(UserError, match=message):
            find_files(str(tmp_path / name))


def test_a_folder_without_permission_is_a_one_line_error(tmp_path, monkeypatch):
    def refuse(self, *arguments, **more):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.exists", refuse)
    with pytest.raises(UserError, match=r"^data\.path: .*x\.txt: Permission denied$"):
        find_files(str(tmp_path / "x.txt"))


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_a_file_without_permission_is_a_one_line_error(tmp_path, monkeypatch, name):
    def refuse(*arguments, **more):
        raise PermissionError(13, "Permission denied", name)

    path = tmp_path / name
    path.touch()
    monkeypatch.setattr("pathlib.Path.open", refuse)
    monkeypatch.setattr("gzip.open", refuse)
    monkeypatch.setattr("pyarrow.parquet.ParquetFile", refuse)
    with pytest.raises(UserError, match=rf"{name}: Permission denied"):
        list(texts_of(path) if name.endswith("txt") else read_records(path))


def test_D12_arrays_tables_and_capital_suffixes_are_read(tmp_path):
    rows = [{"instruction": "a, b", "output": "c\nd"}, {"instruction": "e", "output": "f"}]
    (tmp_path / "a.JSON").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name, delimiter in (("c.csv", ","), ("d.TSV", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["instruction", "output"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    (tmp_path / "e.TXT").write_text("text", encoding="utf-8")
    *tables, text = find_files(str(tmp_path))
    assert [[record.data for record in read_records(path)] for path in tables] == [rows] * 4
    assert [chunk.text for chunk in read_texts(text)] == ["text"]


def test_D12_bad_rows_of_arrays_and_tables_have_a_line_and_a_reason(tmp_path):
    (tmp_path / "a.json").write_text('[{"x": 1}, 2]', encoding="utf-8")
    assert records_of(tmp_path / "a.json") == [(1, {"x": 1}), (2, "not an object but a number")]
    (tmp_path / "b.csv").write_bytes(b"x,y\n1,\n1,2,3\n")
    assert records_of(tmp_path / "b.csv") == [(2, {"x": "1"}), (3, "3 cells, but the header has 2")]
    (tmp_path / "c.csv").write_bytes(b"x\n\xff\n")
    assert "not readable" in records_of(tmp_path / "c.csv")[0][1]


def test_D12_a_json_file_of_a_single_object_beside_data_is_not_read(tmp_path):
    (tmp_path / "data.json").write_text('\ufeff\n [{"text": "a"}]')
    (tmp_path / "lines.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "dataset_info.json").write_text('{"splits": ["train"]}\n')
    (tmp_path / "config.json").write_text('{\n "splits": ["train"]\n}\n')
    (tmp_path / "empty.json").write_text("")
    assert [path.name for path in files.find_files(str(tmp_path))] == ["data.json", "lines.json"]

import pytest

from tinsmith.core import jsonfile
from tinsmith.core.errors import UserError
from tinsmith.core.jsonfile import read_object


def test_an_object_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, "é"]}', encoding="utf-8")
    assert read_object(path) == {"a": [1, "é"]}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b"\xff{}", "not UTF-8 text"),
        (b"[" * 100000, "not valid JSON"),
    ],
)
def test_other_content_gives_one_line_with_the_file(tmp_path, raw, message):
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    with pytest.raises(UserError) as caught:
        read_object(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_missing_files_folders_and_long_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file"):
        read_object(tmp_path / "absent.json")
    with pytest.raises(UserError, match="directory"):
        read_object(tmp_path)
    monkeypatch.setattr(jsonfile, "MAX_JSON_BYTES", 10)
    path = tmp_path / "long.json"
    path.write_text('{"a": "0123456789"}')
    with pytest.raises(UserError, match="longer than 10 bytes"):
        read_object(path)

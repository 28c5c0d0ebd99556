import errno
import os
import subprocess
import sys

import pytest

from tinsmith.core.errors import Stopped, UserError
from tinsmith.data.prepare.prepare import prepare
from tinsmith.data.prepare.prepared import open_prepared
from tinsmith.data.sources import TasksData, TextData


def test_insufficient_disk_space_is_an_error_before_writing(
    prepared, story_file, monkeypatch, tmp_path
):
    monkeypatch.setattr("tinsmith.data.prepare.prepare.free_space", lambda path: 1000)
    with pytest.raises(UserError, match=r"no space: shards need about .* 1 kB are free"):
        prepared(TextData(path=str(story_file)))
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("call", [0, 1, 2, 5])
def test_a_disk_that_fills_up_leaves_no_partial_folder(
    prepared, story_file, monkeypatch, tmp_path, call
):
    from tinsmith.data.prepare import shards

    earlier = prepared(TasksData(count=20)).folder
    calls = iter(range(10**9))
    write = shards._HashedFile.write

    def full(self, data):
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(shards._HashedFile, "write", full)
    with pytest.raises(UserError, match="the disk is full"):
        prepared(TextData(path=str(story_file)))
    assert list((tmp_path / "data").iterdir()) == [earlier]
    monkeypatch.undo()
    open_prepared(earlier, verify=True)
    prepared(TextData(path=str(story_file)))


def test_an_unwritable_folder_is_a_one_line_error(story_file, tokenizer, tmp_path, monkeypatch):
    def refuse(self, *arguments, **more):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(UserError, match=r"Permission denied") as caught:
        prepare(TextData(path=str(story_file)), tokenizer, "documents", tmp_path / "data", print)
    assert "\n" not in str(caught.value)


def test_a_stop_request_ends_preparation_and_leaves_no_files(prepared, story_file, tmp_path):
    polls = iter([False] * 20 + [True] * 100)
    with pytest.raises(Stopped) as caught:
        prepared(TextData(path=str(story_file)), stop=lambda: next(polls))
    assert caught.value.code == 75
    assert list((tmp_path / "data").iterdir()) == []


SCRIPT = """
import sys
from pathlib import Path
from tinsmith.data.sources import TextData
from tinsmith.data.prepare.prepare import prepare
from tinsmith.text.chat import BadRecord, encode_chat
from tinsmith.text.config import TokenizerConfig, TrainTokenizerConfig
tokenizer = TokenizerConfig(train=TrainTokenizerConfig(vocab_size=300))
prepare(TextData(path=sys.argv[1]), tokenizer, "documents", Path(sys.argv[2]))
"""


def test_the_next_preparation_removes_the_files_of_a_killed_one(story_file, tmp_path):
    def run(root, **environment):
        command = [sys.executable, "-c", SCRIPT, str(story_file), str(root)]
        return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)

    events = tmp_path / "events"
    whole = run(tmp_path / "whole", TINSMITH_COUNT_EVENTS=str(events))
    assert whole.returncode == 0, whole.stderr
    (expected,) = (tmp_path / "whole").iterdir()
    count = len(events.read_text().splitlines())
    assert count >= 10
    for kill_at in (1, count // 2, count - 1, count):
        root = tmp_path / f"killed-{kill_at}"
        assert run(root, TINSMITH_KILL_AT=str(kill_at)).returncode == -9
        visible = [path for path in root.iterdir() if not path.name.startswith(".")]
        assert len(visible) == (kill_at == count)
        assert run(root).returncode == 0
        assert [path.name for path in root.iterdir()] == [expected.name]
        for path in expected.rglob("*.*"):
            if path.is_file():
                assert (
                    root / expected.name / path.relative_to(expected)
                ).read_bytes() == path.read_bytes()


def test_preparing_does_not_import_torch():
    code = "import sys; import tinsmith.data.prepare.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

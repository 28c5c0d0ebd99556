"""T11 to T13: a terminal that goes away or lacks characters, and files that cannot be written."""

import subprocess
import sys

import pytest
import yaml

from tinsmith.core.log import RunLog


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "latin-1"])
def test_T13_a_character_that_the_terminal_lacks_does_not_end_a_run(encoding):
    code = "from tinsmith.core.log import *; escape_unencodable(); print_line('a\\ufffd\\u4e2d')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={"PYTHONIOENCODING": encoding}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"a\\ufffd")


def test_T12_a_run_goes_on_when_the_reader_of_its_output_has_gone(tmp_path, recipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "tinsmith", "train", str(path), "--name", "run"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
        env={"TINSMITH_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=300)
    assert process.returncode == 0, process.stderr.read() if process.stderr else ""
    assert "finished" in (tmp_path / "runs" / "run" / "log.txt").read_text()


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
def test_T11_a_file_that_cannot_be_written_is_one_warning(name, tmp_path, capsys):
    (tmp_path / name).mkdir()  # cannot be opened as a file
    log = RunLog(tmp_path)
    for step in range(3):
        log.line(f"step {step}")
        log.metrics({"step": step})
    output = capsys.readouterr()
    assert output.out == "step 0\nstep 1\nstep 2\n"
    assert output.err.count("cannot be written") == 1
    other = {"metrics.jsonl": "log.txt", "log.txt": "metrics.jsonl"}[name]
    assert len((tmp_path / other).read_text().splitlines()) == 3

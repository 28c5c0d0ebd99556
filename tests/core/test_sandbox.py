"""The sandbox ends failing, endless and hostile programs and reports how they ended."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinsmith.core.errors import UserError
from tinsmith.core.sandbox import SandboxLimits, run_python

LONG_LIMIT = SandboxLimits(seconds=20.0, strict=True)
"""Limits for programs that end by themselves, on a machine that may be busy."""


def confined() -> bool:
    """Return True if this system has Landlock and seccomp."""
    try:
        return run_python("pass", SandboxLimits(strict=True)).status == "ok"
    except UserError:
        return False


needs_sandbox = pytest.mark.skipif(not confined(), reason="this system lacks Landlock or seccomp")


def children() -> list[str]:
    """Return the child processes of this process."""
    result = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="], capture_output=True, text=True
    )
    return [line for line in result.stdout.splitlines() if "ps" not in line.split()]


def test_a_program_that_ends_well_returns_its_output():
    result = run_python("import sys\nprint('hällo', 6 * 7)\nprint('aside', file=sys.stderr)")
    assert (result.status, result.code) == ("ok", 0)
    assert result.output.splitlines() == ["hällo 42", "aside"]


def test_a_program_cannot_read_its_own_text_from_stdin():
    """A file as stdin could be read again from its beginning."""
    result = run_python("import os\nprint(os.read(0, 9), os.lseek(0, 0, 0), os.read(0, 9))")
    assert result.output == "b'' 0 b''\n"


def test_a_program_runs_as_main_without_modules_of_the_sandbox():
    program = "import sys\nprint(__name__, vars(sys.modules['__main__']) is globals())"
    assert run_python(program).output == "__main__ True\n"
    for name in ("os", "sys"):
        assert f"NameError: name '{name}' is not defined" in run_python(name).output


def test_a_failing_program_fails_with_its_traceback():
    result = run_python("assert 1 == 2, 'no'")
    assert (result.status, result.code) == ("failed", 1)
    assert "AssertionError: no" in result.output


def test_syntax_errors_and_null_characters_fail():
    assert run_python("def f(:").status == "failed"
    assert run_python("x = '\ud800'\n").status == "ok"
    assert run_python("\0").status == "failed"


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)", "input()"])
def test_a_program_that_does_not_end_is_stopped_by_the_time_limit(program):
    began = time.monotonic()
    result = run_python(program, SandboxLimits(seconds=1.0))
    assert time.monotonic() - began < 10
    assert result.status == ("failed" if program == "input()" else "timeout")
    assert not children()


def test_a_program_that_allocates_too_much_memory_fails():
    result = run_python("x = bytearray(4 << 30)\nprint('got it')", LONG_LIMIT)
    assert result.status == "failed"
    assert "MemoryError" in result.output


def test_a_program_that_prints_a_gigabyte_is_stopped(tmp_path):
    began = time.monotonic()
    program = "import sys\nfor _ in range(1024): sys.stdout.write('x' * 2**20)"
    result = run_python(program, SandboxLimits(seconds=30.0))
    assert result.status == "flood"
    assert len(result.output) == SandboxLimits().output_bytes
    assert time.monotonic() - began < 20


@needs_sandbox
@pytest.mark.parametrize(
    "program",
    [
        "import os\nos.fork()\nprint('two of us')",
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['true'])\nprint('ran')",
        "import threading\nthreading.Thread(target=print).start()\nprint('started')",
    ],
)
def test_a_program_that_forks_is_refused(program):
    result = run_python(program, LONG_LIMIT)
    assert result.status == "failed"
    assert not {"two of us", "ran", "started"} & set(result.output.splitlines())
    assert not children()


@needs_sandbox
def test_a_program_cannot_write_make_or_remove_files(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("here")
    os.chmod(tmp_path, 0o777)
    os.chmod(kept, 0o666)
    for program in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(kept)!r}, 'w').write('gone')",
        f"open({str(kept)!r}, 'a').write('more')",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.rename({str(kept)!r}, {str(tmp_path / 'moved')!r})",
        f"import os; os.mkdir({str(tmp_path / 'folder')!r})",
        f"import os; os.symlink('/', {str(tmp_path / 'link')!r})",
        "open('/tmp/tinsmith-sandbox-test', 'w')",
    ):
        result = run_python(program, LONG_LIMIT)
        assert result.status == "failed", program
        assert "PermissionError" in result.output, program
    assert kept.read_text() == "here"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert not Path("/tmp/tinsmith-sandbox-test").exists()


@needs_sandbox
@pytest.mark.parametrize("call", ["os.kill(os.getppid(), 9)", "os.kill(-1, 9)", "os.killpg(1, 9)"])
def test_a_program_cannot_signal_others(call):
    result = run_python(f"import os\n{call}\nprint('sent')", LONG_LIMIT)
    assert result.status == "failed"
    assert "PermissionError" in result.output


@needs_sandbox
def test_a_program_has_no_network():
    result = run_python("import socket\nsocket.socket()\nprint('open')", LONG_LIMIT)
    assert result.status == "failed"
    assert "open" not in result.output.splitlines()


def test_limits_cannot_be_raised_again():
    program = (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nx = bytearray(4 << 30)"
    )
    assert run_python(program, LONG_LIMIT if confined() else SandboxLimits()).status == "failed"


def test_a_program_sees_nothing_of_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "hidden")
    result = run_python("import os\nprint(sorted(os.environ), os.getcwd())")
    assert "SECRET" not in result.output
    assert result.output.endswith("/\n")


def test_hashes_and_set_orders_are_the_same_in_every_run():
    program = "print(hash('tinsmith'), list({'a', 'b', 'c', 'd'}))"
    assert run_python(program).output == run_python(program).output


def test_a_file_limit_holds_without_landlock_too(monkeypatch):
    """The kernel's limit on file sizes exists on every system."""
    program = "import resource\nprint(resource.getrlimit(resource.RLIMIT_FSIZE))"
    assert run_python(program, SandboxLimits(file_bytes=1000)).output.strip() == "(1000, 1000)"


def test_missing_landlock_is_an_error_in_strict_mode(monkeypatch, tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import sandbox_child\n"
        "sandbox_child.restrict = lambda libc: ['landlock']\n"
        'sandbox_child.main(\'{"seconds": 1, "memory_bytes": 9, "file_bytes": 0, "strict": true}\')'
    )
    core = Path(__file__).resolve().parents[2] / "tinsmith" / "core"
    done = subprocess.run(
        [sys.executable, "-c", program, str(core)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "not confined: this system has no landlock" in done.stderr

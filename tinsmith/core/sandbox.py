"""Run programs that a model wrote in a restricted process, to test them (reward `unit_tests`).

A program gets a Python of its own with an empty environment, in a process of its own, with limits
on time, memory, files and output; `sandbox_child.py` lists the other restrictions. The sandbox is
made for programs that are wrong by accident: they loop, fork, fill the memory or the disk. It does
not stop an attacker. Run everything in a container if you need that.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from tinsmith.core.errors import UserError

Status = Literal["ok", "failed", "timeout", "flood"]
_LOADER = """\
def _load():
    import os, sys
    text = sys.stdin.buffer.read()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return compile(text, "<program>", "exec")
exec(_load())
"""
"""Program text that reads the real program from stdin, empties stdin and runs it."""
_READ_BYTES = 4096
"""Bytes to read from the program at a time."""


@dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """Resource limits of a sandboxed program."""

    seconds: float = 5.0
    """Limit of wall-clock time."""
    memory_bytes: int = 1 << 29
    """Limit of address space."""
    file_bytes: int = 0
    """Largest file that the program may write, if it may write files at all."""
    output_bytes: int = 1 << 16
    """Output on stdout and stderr together. The program is killed if it prints more."""
    strict: bool = False
    """If True, refuse to run on a system that cannot forbid writing files and starting processes.
    """


class SandboxResult(NamedTuple):
    """Result of a sandboxed program."""

    status: Status
    """`ok`: exit code 0. `failed`: another exit code, or a signal. `timeout` and `flood`: killed
    for its time or for its output.
    """
    code: int
    """Exit code, or minus the number of the signal that ended the program."""
    output: str
    """Output on stdout and stderr, up to `output_bytes`."""
    seconds: float


def run_python(program: str, limits: SandboxLimits = SandboxLimits()) -> SandboxResult:
    """Run the text of a Python program until it ends or reaches a limit.

    Whatever the program does is reported in the result. Raise UserError if this system has no such
    limits, or lacks a restriction that `strict` requires.
    """
    if sys.platform == "win32":
        raise UserError("sandbox: programs cannot be confined on Windows; use Linux or macOS")
    child_limits = {
        "seconds": limits.seconds,
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
        "strict": limits.strict,
    }
    python = [sys.executable, "-s", "-P", "-S", "-B", "-u"]
    child_script = str(Path(__file__).with_name("sandbox_child.py"))
    started = time.monotonic()
    with tempfile.TemporaryFile() as source:
        source.write(program.encode("utf-8", "replace"))
        source.seek(0)
        process = subprocess.Popen(
            [*python, child_script, json.dumps(child_limits), *python, "-c", _LOADER],
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"PYTHONHASHSEED": "0"},
            cwd="/",
            start_new_session=True,
        )
    try:
        status, raw = _read_output(process, started + limits.seconds, limits.output_bytes)
    finally:
        _kill(process)
    code = process.returncode
    if status == "ok" and code:
        status = "failed"
    output = raw.decode("utf-8", "replace")
    if code == 1 and output.startswith("not confined:"):
        raise UserError(f"sandbox: {output.strip()}; set strict: false, or use a newer Linux")
    return SandboxResult(status, code, output, time.monotonic() - started)


def _read_output(
    process: subprocess.Popen[bytes], deadline: float, max_bytes: int
) -> tuple[Status, bytes]:
    """Read the output until the process ends, runs out of time or prints too much."""
    assert process.stdout is not None
    output, is_open = bytearray(), True
    while is_open:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not select.select([process.stdout], [], [], remaining)[0]:
            return "timeout", bytes(output)
        chunk = os.read(process.stdout.fileno(), _READ_BYTES)
        output += chunk
        is_open = bool(chunk)
        if len(output) > max_bytes:
            return "flood", bytes(output[:max_bytes])
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "timeout", bytes(output)
    return "ok", bytes(output)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its group."""
    with suppress(ProcessLookupError, PermissionError):  # all processes have ended already
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()

"""Programs that a model wrote, run where they can do little: answers that are to be tested.

A program gets a Python of its own with an empty environment, in a process of its own, with limits
on time, memory, files and output; see `confine.py` for what else it cannot do. That is made for
programs that are wrong by accident: they loop, fork, fill the memory or the disk. It is no wall
against an attacker; who wants one runs all of it in a container.
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
"""Becomes the program that stdin holds, and leaves it nothing there to read again."""
_KEPT = 4096
"""Bytes read at a time."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use."""

    seconds: float = 5.0
    """By the clock, from its start to its end."""
    memory_bytes: int = 1 << 29
    """Of address space."""
    file_bytes: int = 0
    """That may be written to one file, where files can be written at all."""
    output_bytes: int = 1 << 16
    """Said on stdout and stderr together; more ends the program."""
    strict: bool = False
    """Run nothing where the system cannot keep it from writing files and from making processes."""


class Outcome(NamedTuple):
    """How a program ended."""

    status: Status
    """`ok`: exit code 0. `failed`: another one, or a signal. `timeout` and `flood`: it was killed,
    for its time or for what it printed."""
    code: int
    """The exit code; minus the signal that ended it."""
    output: str
    """What it said, up to `output_bytes`."""
    seconds: float


def run_python(program: str, limits: Limits = Limits()) -> Outcome:
    """Run the text of a Python program to its end, or to one of its limits.

    Whatever the program does is an Outcome. UserError where this system has no such limits, or
    lacks a fence that `strict` wants.
    """
    if sys.platform == "win32":
        raise UserError("sandbox: programs cannot be confined on Windows; use Linux or macOS")
    wanted = {
        "seconds": limits.seconds,
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
        "strict": limits.strict,
    }
    python = [sys.executable, "-s", "-P", "-S", "-B", "-u"]
    confine = str(Path(__file__).with_name("confine.py"))
    began = time.monotonic()
    with tempfile.TemporaryFile() as source:
        source.write(program.encode("utf-8", "replace"))
        source.seek(0)
        process = subprocess.Popen(
            [*python, confine, json.dumps(wanted), *python, "-c", _LOADER],
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"PYTHONHASHSEED": "0"},
            cwd="/",
            start_new_session=True,
        )
    try:
        status, said = _listen(process, began + limits.seconds, limits.output_bytes)
    finally:
        _end(process)
    code = process.returncode
    if status == "ok" and code:
        status = "failed"
    output = said.decode("utf-8", "replace")
    if code == 1 and output.startswith("not confined:"):
        raise UserError(f"sandbox: {output.strip()}; set strict: false, or use a newer Linux")
    return Outcome(status, code, output, time.monotonic() - began)


def _listen(process: subprocess.Popen[bytes], end: float, most: int) -> tuple[Status, bytes]:
    """What the process says until it ends, runs out of time, or has said too much."""
    assert process.stdout is not None
    heard, open_ = bytearray(), True
    while open_:
        left = end - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            return "timeout", bytes(heard)
        new = os.read(process.stdout.fileno(), _KEPT)
        heard += new
        open_ = bool(new)
        if len(heard) > most:
            return "flood", bytes(heard[:most])
    try:
        process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "timeout", bytes(heard)
    return "ok", bytes(heard)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of it and of its group."""
    with suppress(ProcessLookupError, PermissionError):  # all of it has ended already
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()

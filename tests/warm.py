"""`tinsmith` in a process of its own, without the seconds that importing torch takes: a fork of a
server that has imported it (the standard library's forkserver).

It has its own environment, folder and streams, and dies of signals like any other. Two things are
shared: imports and the seed of hashes. Where those matter, start `python -m tinsmith`.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import tinsmith

TINSMITH = Path(tinsmith.__file__).with_name("__main__.py")
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.preloaded"])


class Process:
    """What tests use of subprocess.Popen: both streams in `stdout`, text in, an exit code.

    `program`, a file and its first words, is run in the place of `tinsmith`.
    """

    def __init__(
        self,
        words: Sequence[object],
        environment: Mapping[str, str],
        folder: Path,
        output: str = "",
        program: Sequence[object] = (TINSMITH,),
    ):
        reader, writer = _SERVER.Pipe(duplex=False)
        command = [str(word) for word in (*program, *words)]
        self._process = _SERVER.Process(
            target=_run, args=(command, dict(environment), str(folder), output, writer)
        )
        self._process.start()
        writer.close()
        self.stdout = os.fdopen(os.dup(reader.fileno()), encoding="utf-8")
        reader.close()

    @property
    def returncode(self) -> int | None:
        """Negative where a signal ended it; None while it runs."""
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, None]:
        """The rest of what it says, and its end; TimeoutError, and it is killed, after `timeout`
        seconds.
        """
        late = threading.Event()
        watch = threading.Timer(timeout, lambda: (late.set(), self._process.kill()))
        watch.start()
        output = self.stdout.read()  # killing ends the reading, too
        self.stdout.close()
        self._process.join()
        watch.cancel()
        if late.is_set():
            raise TimeoutError(f"not over after {timeout} seconds: {output}")
        return output, None

    def send_signal(self, number: int) -> None:
        """As subprocess.Popen."""
        os.kill(self._process.pid or 0, number)


def _run(
    command: list[str], environment: dict[str, str], folder: str, output: str, writer: Connection
) -> None:
    """In the fork."""
    with tempfile.TemporaryFile() as typed:
        typed.write(output.encode())
        typed.seek(0)
        os.dup2(typed.fileno(), 0)
    os.dup2(writer.fileno(), 1)
    os.dup2(writer.fileno(), 2)
    writer.close()
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()

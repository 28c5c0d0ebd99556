"""The command line as a user runs it, in one folder of runs for the whole session."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm


class Shell:
    """Runs `tinsmith ...` as a process in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, *words: object, code: int = 0, stdin: str = "", limit: int = 300) -> str:
        """Run a command and return both streams. Assert that it exits with `code` within `limit`
        seconds and prints no traceback.
        """
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        process = warm.Process(words, environment, self.folder, stdin)
        output, _ = process.communicate(limit)
        assert process.returncode == code, output
        assert "Traceback" not in output, output
        if code == 2:
            assert sum(line.startswith("error: ") for line in output.splitlines()) <= 1
        return output

    def cold(self, *words: object, limit: int = 300) -> str:
        """Run a command in a new interpreter, as a user does."""
        done = subprocess.run(
            [sys.executable, "-m", "tinsmith", *map(str, words)],
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=limit,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(tmp_path_factory.mktemp("shell"))


@pytest.fixture(scope="session")
def quickstart(shell: Shell) -> str:
    """Output of the tiny quickstart, which runs once."""
    return shell.cold("quickstart", "--tiny")

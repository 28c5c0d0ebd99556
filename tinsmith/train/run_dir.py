"""The folder of a run: its path, `config.yaml` and `env.json`, and when a run may resume in it."""

import datetime
import fcntl
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import tinsmith
from tinsmith.config import RunConfig, dump, from_dict
from tinsmith.core.errors import UserError
from tinsmith.core.files import atomic_write, inside
from tinsmith.core.parse import to_plain
from tinsmith.core.yamlfile import read_yaml
from tinsmith.train.parallel import Ranks

MUTABLE_SECTIONS = {"log", "eval", "parallel", "init_from", "schema"}
MUTABLE_TRAIN_KEYS = {
    "steps",
    "device",
    "save_every",
    "eval_every",
    "sample_every",
    "keep",
    "compile",
    "max_nonfinite_steps",
}


def runs_root() -> Path:
    """Return `$TINSMITH_RUNS`, or `runs` in the working directory."""
    return Path(os.environ.get("TINSMITH_RUNS", "runs"))


def default_run_name(recipe: str) -> str:
    """Return `<recipe>-<date>`, with a counter if that folder exists."""
    base = f"{recipe}-{datetime.date.today():%Y%m%d}"
    names = (base if count == 1 else f"{base}-{count}" for count in range(1, 10_000))
    return next(name for name in names if not (runs_root() / name).exists())


def run_folder(name: str) -> Path:
    """Return the folder of the run called `name`. Raise UserError if the name is a path."""
    if name.startswith(".") or "/" in name or "\\" in name:
        raise UserError(
            f"--name '{name}': a run's name is one word, without / and not beginning with a dot"
        )
    return inside(runs_root(), name)


def create_run_folder(folder: Path, resume: bool) -> bool:
    """Create the folder. Return True if it holds a run to resume.

    Raise UserError if it is not empty and `resume` is False.
    """
    taken = folder.exists() and any(folder.iterdir())
    if taken and not resume:
        name = folder.name
        raise UserError(
            f"{folder} exists already; continue it with --resume, or choose another name than "
            f"--name {name}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}); set TINSMITH_RUNS to a folder you may "
            "write"
        ) from None
    return taken


class RunLock:
    """An exclusive lock on the folder of a run, held while a process trains it.

    Raise UserError with process id and host if another process holds it.
    """

    def __init__(self, folder: Path):
        self._file = (folder / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise UserError(
                f"{folder}: {holder} trains this run at the moment; stop it first, or choose "
                "another --name"
            ) from None
        except OSError:  # a file system without locks
            return
        self._write(f"process {os.getpid()} on {platform.node()}")

    def release(self) -> None:
        """Release the lock."""
        self._write("")
        self._file.close()

    def _write(self, text: str) -> None:
        self._file.truncate(0)
        self._file.write(text)
        self._file.flush()


def write_config_and_env(folder: Path, config: RunConfig, ranks: Ranks) -> None:
    """Write `config.yaml` and `env.json`."""
    atomic_write(folder / "config.yaml", dump(config))
    atomic_write(folder / "env.json", json.dumps(environment(ranks), indent=1) + "\n")


def environment(ranks: Ranks) -> dict[str, Any]:
    """Describe git commit, versions, device, threads and processes."""
    return {
        "argv": sys.argv,
        "git": _git(),
        "versions": {
            "tinsmith": tinsmith.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": str(ranks.device),
        "threads": torch.get_num_threads(),
        "world_size": ranks.world_size,
    }


def _git() -> dict[str, Any] | None:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return {"sha": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def check_resume_config(folder: Path, config: RunConfig) -> None:
    """Raise UserError if `config` differs from that of the run in a key that may not change."""
    path = folder / "config.yaml"
    if not path.exists():
        return
    old, new = to_plain(from_dict(read_yaml(path), str(path))), to_plain(config)
    for section in old.keys() - MUTABLE_SECTIONS - {"train"}:
        if old[section] != new[section]:
            raise UserError(_differs(folder, section, old[section], new[section]))
    for key in old["train"].keys() - MUTABLE_TRAIN_KEYS:
        if old["train"][key] != new["train"][key]:
            raise UserError(_differs(folder, f"train.{key}", old["train"][key], new["train"][key]))


def _differs(folder: Path, key: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        name = next(name for name in old if old[name] != new.get(name))
        return _differs(folder, f"{key}.{name}", old[name], new[name])
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        at = next(index for index, each in enumerate(old) if each != new[index])
        return _differs(folder, f"{key}.{at}", old[at], new[at])
    output = f"{folder} was begun with {key}: {old}, not {new}"
    return f"{output}; resume with the same recipe, or begin a new run"

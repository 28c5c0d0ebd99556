"""Atomic writes of files and folders, and checks of file names that come from outside."""

import hashlib
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tinsmith.core.errors import UserError
from tinsmith.core.kill_points import kill_point


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file atomically: a reader, or a crash, sees the old content or the new one."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    raw = data.encode("utf-8") if isinstance(data, str) else data
    try:
        with temporary.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        kill_point(f"written {path.name}")
        temporary.replace(path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    kill_point(f"renamed {path.name}")


@contextmanager
def atomic_dir(target: Path) -> Generator[Path]:
    """Yield a temporary folder that is renamed to `target` on success and removed on failure.

    An existing `target` is replaced. All files are fsynced before the rename.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        yield temporary
        fsync_tree(temporary)
        kill_point(f"complete {target.name}")
        if target.exists():
            replaced = target.with_name(f".{target.name}.old-{os.getpid()}")
            target.rename(replaced)
            temporary.rename(target)
            shutil.rmtree(replaced)
        else:
            temporary.rename(target)
        fsync_folder(target.parent)
        kill_point(f"renamed {target.name}")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_stale(folder: Path) -> None:
    """Remove temporary files that a killed process left in `folder` (names like `.x.tmp-123`)."""
    if not folder.is_dir():
        return
    for path in folder.glob(".*.tmp-*"):
        if _is_alive(path.name.rsplit("-", 1)[-1]):
            continue
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _is_alive(process: str) -> bool:
    if not process.isdigit() or int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def fsync_tree(folder: Path) -> None:
    """Fsync every file and folder below `folder`."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            fsync_folder(path)
    fsync_folder(folder)


def fsync_folder(folder: Path) -> None:
    """Fsync the entries of one folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_space(path: Path) -> int:
    """Return the free bytes on the disk of `path` or of its nearest existing parent."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(root: Path, name: str) -> Path:
    """Return `root / name`. Raise UserError if the name leaves `root`: an absolute path, `..`, NUL,
    or a symbolic link that points outside.
    """
    if "\0" in name or not name or Path(name).is_absolute():
        raise UserError(f"{name!r} is not a file name inside {root}")
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{name!r} leads out of {root}")
    return path


def folder_bytes(folder: Path) -> int:
    """Return the total size in bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

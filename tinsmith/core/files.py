"""Files that are either there, whole, or not there at all."""

import hashlib
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tinsmith.core.errors import UserError
from tinsmith.core.kill_points import event


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one, never a
    part.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    raw = data.encode("utf-8") if isinstance(data, str) else data
    try:
        with temporary.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        event(f"written {path.name}")
        temporary.replace(path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    event(f"renamed {path.name}")


@contextmanager
def atomic_dir(target: Path) -> Generator[Path]:
    """A temporary folder beside `target` that becomes `target` on success and vanishes on failure.

    An existing `target` is replaced. Files written inside should be fsynced by `fsync_tree`, which
    this calls.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        yield temporary
        fsync_tree(temporary)
        event(f"complete {target.name}")
        if target.exists():
            old = target.with_name(f".{target.name}.old-{os.getpid()}")
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old)
        else:
            temporary.rename(target)
        fsync_folder(target.parent)
        event(f"renamed {target.name}")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written in `folder` (names like `.x.tmp-123`)."""
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
    """Force every file below `folder`, and the folders themselves, to the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            fsync_folder(path)
    fsync_folder(folder)


def fsync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_space(path: Path) -> int:
    """Free bytes on the disk that holds `path` or its nearest existing parent."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(root: Path, name: str) -> Path:
    """`root / name`, refused where the name leaves `root` (absolute, `..`, NUL or a link that
    leads out).
    """
    if "\0" in name or not name or Path(name).is_absolute():
        raise UserError(f"{name!r} is not a file name inside {root}")
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{name!r} leads out of {root}")
    return path


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

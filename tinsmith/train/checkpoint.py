"""Checkpoints: folders of safetensors and JSON files, written atomically.

checkpoints/step-00001000/
  model.safetensors  optim.safetensors  objective.safetensors  state.json
  rng-00000.safetensors (one per rank)  config.yaml  tokenizer.json  manifest.json (last)
checkpoints/LATEST
"""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinsmith.core.errors import Failure, UserError
from tinsmith.core.files import atomic_dir, atomic_write, free_space, remove_stale
from tinsmith.core.kill_points import kill_point
from tinsmith.core.manifest import newest_valid, verify, write_manifest
from tinsmith.core.units import format_size
from tinsmith.text.tokenizer import Tokenizer
from tinsmith.train.config import KeepConfig

OBJECTIVE_FILE = "objective.safetensors"
"""Parameters and buffers of an objective. `final/` has a file of the same name."""
REQUIRED_FILES = ("model.safetensors", "optim.safetensors", "state.json", "config.yaml")


class Checkpoint(NamedTuple):
    """Everything that a run needs to resume."""

    model: dict[str, Tensor]
    optim: dict[str, Tensor]
    objective: dict[str, Tensor]
    state: dict[str, Any]
    rng: list[bytes]
    """A safetensors file per rank."""

    @property
    def nbytes(self) -> int:
        """Return the approximate size on disk in bytes."""
        groups = (self.model, self.optim, self.objective)
        return sum(t.numel() * t.element_size() for group in groups for t in group.values()) + 2**16


class DiskFull(Failure):
    """A checkpoint could not be written because the disk is full. Earlier ones are unchanged."""


def save(root: Path, checkpoint: Checkpoint, config: str, tokenizer: Tokenizer) -> Path:
    """Write `root/step-XXXXXXXX` in one rename. Raise DiskFull if there is no space; then no
    incomplete folder remains.
    """
    step = checkpoint.state["step"]
    target = root / f"step-{step:08d}"
    root.mkdir(parents=True, exist_ok=True)
    free = free_space(root)
    if free < checkpoint.nbytes:
        raise DiskFull(
            f"{format_size(checkpoint.nbytes)} needed, {format_size(free)} free at {root}"
        )
    try:
        with atomic_dir(target) as folder:
            _write(folder, checkpoint, config, tokenizer)
            write_manifest(folder, {"step": step})
            kill_point("manifest")
        atomic_write(root / "LATEST", target.name + "\n")
    except (OSError, SafetensorError) as error:
        if _is_full(error):
            raise DiskFull(
                f"{format_size(checkpoint.nbytes)} needed, "
                f"{format_size(free_space(root))} free at {root}"
            ) from None
        raise
    return target


def _write(folder: Path, snapshot: Checkpoint, config: str, tokenizer: Tokenizer) -> None:
    meta = {"format": "pt"}  # one key: the order of several is random, and so would be the hash
    for name, tensors in (
        ("model", snapshot.model),
        ("optim", snapshot.optim),
        ("objective", snapshot.objective),
    ):
        if tensors:
            save_file(tensors, folder / f"{name}.safetensors", metadata=meta)
            kill_point(f"{name}.safetensors")
    (folder / "state.json").write_text(json.dumps(snapshot.state, indent=1), encoding="utf-8")
    kill_point("state.json")
    for rank, data in enumerate(snapshot.rng):
        (folder / f"rng-{rank:05d}.safetensors").write_bytes(data)
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    kill_point("config.yaml")
    tokenizer.save(folder)
    kill_point("tokenizer")


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left" in str(error) or "os error 28" in str(error)


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint. Raise UserError if it is damaged."""
    problem = verify(folder, hashes=True, required=REQUIRED_FILES)
    if problem:
        raise UserError(f"{folder}: {problem}")
    try:
        groups = [
            _tensors(folder / f"{name}.safetensors") for name in ("model", "optim", "objective")
        ]
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        rng = [path.read_bytes() for path in sorted(folder.glob("rng-*.safetensors"))]
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{folder}: cannot be read ({error}); resume from an older checkpoint"
        ) from None
    return Checkpoint(groups[0], groups[1], groups[2], state, rng)


def _tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.exists() else {}


def latest(root: Path) -> tuple[Path | None, list[str]]:
    """Return the newest valid checkpoint, and the reasons why newer ones are invalid."""
    return newest_valid(root, required=REQUIRED_FILES)


def latest_until(root: Path, step: int) -> Path | None:
    """Return the newest valid checkpoint of a step up to `step`, or None."""
    for folder in sorted(root.glob("step-*"), reverse=True):
        is_earlier = folder.name <= f"step-{step:08d}"
        if is_earlier and verify(folder, hashes=True, required=REQUIRED_FILES) is None:
            return folder
    return None


def remove_incomplete(root: Path) -> None:
    """Remove the incomplete folders of killed saves."""
    remove_stale(root)


def prune(root: Path, keep: KeepConfig, best_step: int | None) -> None:
    """Delete checkpoints that `keep` does not select. The newest is always kept. `best_step` is the
    step of the lowest validation loss.
    """
    folders = sorted(path for path in root.glob("step-*") if path.is_dir())
    if not folders:
        return
    candidates = (
        folders
        if keep.max_val_loss is None
        else [f for f in folders if _validation_loss(f) < keep.max_val_loss]
    )
    kept = set(candidates[-keep.last :]) | {folders[-1]}
    if keep.best:
        kept |= {folder for folder in candidates if folder.name == f"step-{best_step or 0:08d}"}
    for folder in folders:
        if folder not in kept:
            renamed = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
            folder.rename(renamed)
            kill_point("prune")
            shutil.rmtree(renamed, ignore_errors=True)


def _validation_loss(folder: Path) -> float:
    evaluation = json.loads((folder / "state.json").read_text(encoding="utf-8"))["evaluation"]
    return evaluation["loss"] if evaluation else float("inf")

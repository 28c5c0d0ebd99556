"""Weights on disk: safetensors files, one or several with an index. Nothing else is ever opened."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tinsmith.core.errors import UserError
from tinsmith.core.files import atomic_write, inside
from tinsmith.core.jsonfile import read_object

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_COUNTERS = {"I64", "BOOL"}
"""What a checkpoint holds beside weights; `Stored.weight` is False for them."""
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


class TensorInfo(NamedTuple):
    """A tensor in a file, as the file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    is_weight: bool = True


def find_tensors(folder: Path) -> dict[str, TensorInfo]:
    """All tensors in a folder's `model.safetensors`, or in the files that its index names.

    Reads headers only. UserError where there are none, where a file is missing, truncated or
    outside of the folder, and for tensors that are not floating-point numbers (quantised ones).
    """
    found: dict[str, TensorInfo] = {}
    for file in _files(folder):
        for name, stored in read_header(file).items():
            if name in found:
                raise UserError(f"{file}: {name} is also in {found[name].file.name}")
            found[name] = stored
    return found


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise UserError(_nothing(folder))
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index}: has no weight_map")
    return [_shard(folder, name) for name in sorted(set(map(str, shards.values())))]


def _nothing(folder: Path) -> str:
    pickled = sorted(path.name for kind in _PICKLED for path in folder.glob(kind))
    if not pickled:
        return f"{folder}: has neither {WEIGHTS_FILE} nor {INDEX_FILE}"
    return (
        f"{folder}: has only pickled weights ({pickled[0]}), which can run code when opened and "
        "are never read here; save them as safetensors with transformers' save_pretrained"
    )


def _shard(folder: Path, name: str) -> Path:
    """A shard that the index names. It must not lead out of the folder, nor, where the folder is a
    snapshot in the Hub's cache (whose files are links), out of its repository's part of the cache.
    """
    index, place = folder / INDEX_FILE, folder.resolve()
    if not name.endswith(".safetensors"):
        raise UserError(f"{index}: {name!r:.80} is not a safetensors file")
    cached = place.parent.name == "snapshots" and (place.parent.parent / "blobs").is_dir()
    root = place.parent.parent if cached else place
    try:
        path = inside(root, str(place.relative_to(root) / name))
    except UserError:
        raise UserError(f"{index}: {name!r:.80} leads out of the folder") from None
    if not path.is_file():
        raise UserError(f"{index}: names {name}, which is missing")
    return path


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one file; UserError where it is broken, or where they are quantised.

    The library refuses headers beyond 100 MB, and any that the file's size does not bear out."""
    found: dict[str, TensorInfo] = {}
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                part = tensors.get_slice(name)
                kind = part.get_dtype()
                if kind not in _FLOATS | _COUNTERS:
                    raise UserError(f"{file}: {name} is {kind}; quantised weights cannot be read")
                found[name] = TensorInfo(file, tuple(part.get_shape()), kind in _FLOATS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file: {error}") from None
    return found


def read_tensors(
    stored_tensors: dict[str, TensorInfo],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """The tensors, in memory of their own (a file may change), in the file's dtype or `dtype`."""
    read: dict[str, Tensor] = {}
    for file in sorted({stored.file for stored in stored_tensors.values()}):
        with safe_open(file, "pt") as tensors:
            for name, stored in stored_tensors.items():
                if stored.file == file:
                    mapped = tensors.get_tensor(name)
                    read[name] = mapped.to(device=device, dtype=dtype, copy=True)
    return read


def save_tensors(path: Path, state: dict[str, Tensor]) -> None:
    """Write one safetensors file; equal tensors give equal bytes.

    OSError where the disk is full or refuses. The only metadata is the format: safetensors writes
    several keys in no fixed order.
    """
    try:
        save_file(_apart(state), path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        raise OSError(int(number[1]) if number else 5, str(error), str(path)) from None


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two in the same memory."""
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        ready[name] = plain.clone() if place in seen else plain
        seen.add(place)
    return ready


def save_sharded(folder: Path, state: dict[str, Tensor], max_bytes: int) -> list[Path]:
    """Write `model.safetensors`, or files of up to `max_bytes` (a larger tensor has its own) with
    an index; returns the files that hold the tensors.
    """
    shards = list(_shards(state, max_bytes))
    if len(shards) == 1:
        save_tensors(folder / WEIGHTS_FILE, state)
        return [folder / WEIGHTS_FILE]
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(folder / file, {name: state[name] for name in names})
        places |= dict.fromkeys(names, file)
    index: dict[str, Any] = {
        "metadata": {"total_size": sum(_bytes(tensor) for tensor in state.values())},
        "weight_map": dict(sorted(places.items())),
    }
    atomic_write(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    return [folder / file for file in sorted(set(places.values()))]


def _shards(state: dict[str, Tensor], max_bytes: int) -> Iterable[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in state.items():
        if names and size + _bytes(tensor) > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += _bytes(tensor)
    yield names


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

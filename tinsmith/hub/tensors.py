"""Read and write weights as safetensors: one file, or shards with an index. No other format is
read.
"""

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
"""Dtypes of counters in a checkpoint; `TensorInfo.is_weight` is False for them."""
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


class TensorInfo(NamedTuple):
    """A tensor in a file, as described by the file's header."""

    file: Path
    shape: tuple[int, ...]
    is_weight: bool = True


def find_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Find all tensors in a folder's `model.safetensors`, or in the files that its index names.

    Reads headers only. UserError if there are none, if a file is missing, truncated or outside of
    the folder, and for tensors that are not floating-point numbers (quantised ones).
    """
    tensors: dict[str, TensorInfo] = {}
    for file in _files(folder):
        for name, info in read_header(file).items():
            if name in tensors:
                raise UserError(f"{file}: {name} is also in {tensors[name].file.name}")
            tensors[name] = info
    return tensors


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise UserError(_no_weights_message(folder))
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index}: has no weight_map")
    return [_shard_path(folder, name) for name in sorted(set(map(str, shards.values())))]


def _no_weights_message(folder: Path) -> str:
    pickled = sorted(path.name for kind in _PICKLED for path in folder.glob(kind))
    if not pickled:
        return f"{folder}: has neither {WEIGHTS_FILE} nor {INDEX_FILE}"
    return (
        f"{folder}: has only pickled weights ({pickled[0]}), which can run code when opened and "
        "are never read here; save them as safetensors with transformers' save_pretrained"
    )


def _shard_path(folder: Path, name: str) -> Path:
    """Return the path of a shard that the index names.

    It must not lead out of the folder; if the folder is a snapshot in the Hub's cache, whose files
    are links, it must not lead out of the repository's part of the cache.
    """
    index, resolved = folder / INDEX_FILE, folder.resolve()
    if not name.endswith(".safetensors"):
        raise UserError(f"{index}: {name!r:.80} is not a safetensors file")
    in_hub_cache = (
        resolved.parent.name == "snapshots" and (resolved.parent.parent / "blobs").is_dir()
    )
    root = resolved.parent.parent if in_hub_cache else resolved
    try:
        path = inside(root, str(resolved.relative_to(root) / name))
    except UserError:
        raise UserError(f"{index}: {name!r:.80} leads out of the folder") from None
    if not path.is_file():
        raise UserError(f"{index}: names {name}, which is missing")
    return path


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one file; UserError if the file is damaged or the tensors are
    quantised.

    The safetensors library refuses headers above 100 MB and headers that do not match the file's
    size.
    """
    infos: dict[str, TensorInfo] = {}
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                tensor_slice = tensors.get_slice(name)
                dtype = tensor_slice.get_dtype()
                if dtype not in _FLOATS | _COUNTERS:
                    raise UserError(f"{file}: {name} is {dtype}; quantised weights cannot be read")
                infos[name] = TensorInfo(file, tuple(tensor_slice.get_shape()), dtype in _FLOATS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a complete safetensors file: {error}") from None
    return infos


def read_tensors(
    stored_tensors: dict[str, TensorInfo],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """Read tensors in `dtype` (None: the dtype of the file).

    They are copied out of the memory map, because the file may change.
    """
    loaded: dict[str, Tensor] = {}
    for file in sorted({info.file for info in stored_tensors.values()}):
        with safe_open(file, "pt") as opened:
            for name, info in stored_tensors.items():
                if info.file == file:
                    tensor = opened.get_tensor(name)
                    loaded[name] = tensor.to(device=device, dtype=dtype, copy=True)
    return loaded


def save_tensors(path: Path, state: dict[str, Tensor]) -> None:
    """Write one safetensors file; equal tensors give equal bytes.

    OSError if the disk is full or the write fails. The only metadata is the format, because
    safetensors writes several keys in no fixed order.
    """
    try:
        save_file(_unshared(state), path, metadata={"format": "pt"})
    except SafetensorError as error:
        errno = _OS_ERROR.search(str(error))
        raise OSError(int(errno[1]) if errno else 5, str(error), str(path)) from None


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, contiguous, no two in the same memory."""
    copies: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for name, tensor in state.items():
        copy = tensor.detach().cpu().contiguous()
        address = copy.untyped_storage().data_ptr()
        copies[name] = copy.clone() if address in addresses else copy
        addresses.add(address)
    return copies


def save_sharded(folder: Path, state: dict[str, Tensor], max_bytes: int) -> list[Path]:
    """Write `model.safetensors`, or shards of up to `max_bytes` with an index; return the files.

    A tensor larger than `max_bytes` has a shard of its own.
    """
    shards = list(_shards(state, max_bytes))
    if len(shards) == 1:
        save_tensors(folder / WEIGHTS_FILE, state)
        return [folder / WEIGHTS_FILE]
    weight_map: dict[str, str] = {}
    for shard, names in enumerate(shards, start=1):
        file = f"model-{shard:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(folder / file, {name: state[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    index: dict[str, Any] = {
        "metadata": {"total_size": sum(_num_bytes(tensor) for tensor in state.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    atomic_write(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    return [folder / file for file in sorted(set(weight_map.values()))]


def _shards(state: dict[str, Tensor], max_bytes: int) -> Iterable[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in state.items():
        if names and size + _num_bytes(tensor) > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += _num_bytes(tensor)
    yield names


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

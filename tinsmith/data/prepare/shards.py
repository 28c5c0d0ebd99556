"""Token shards: memory-mapped files of token ids, checked by size and SHA-256.

Shard 0 of a folder is `00000.tokens` (uint16, or uint32 for vocabularies above 65536; little
endian), `00000.index` (uint64: offsets in this shard at which documents start) and, for chats,
`00000.mask` (uint8: 1 for trained tokens). Shard 1 is 00001, and so on. The manifest `shards.json`
lists all files with size and SHA-256. A document may continue in the next shard.
"""

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tinsmith.core.errors import UserError
from tinsmith.core.files import atomic_write, inside, sha256
from tinsmith.core.kill_points import kill_point

FORMAT = 1
MANIFEST = "shards.json"
_FIX = "delete {} and run `tinsmith prepare` again"


class ShardWriter:
    """Writes documents into shards of about `shard_tokens` tokens; use as a context manager."""

    def __init__(
        self, folder: Path, vocab_size: int, *, masked: bool = False, shard_tokens: int = 2**26
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.vocab_size, self.masked, self.shard_tokens = (
            folder,
            vocab_size,
            masked,
            shard_tokens,
        )
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.tokens = self.documents = self.bytes = 0
        self._shards: list[dict[str, Any]] = []
        self._open: _OpenShard | None = None
        self._at_document_start = True

    def add(
        self,
        ids: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        text_bytes: int = 0,
        last: bool = True,
    ) -> None:
        """Append the ids (n,) of a document, or of a piece of it that is not the `last`, and for
        chats the loss mask (n,).
        """
        id_array = np.asarray(ids, dtype=np.int64)
        assert len(id_array), "a document has at least one token"
        assert 0 <= id_array.min() <= id_array.max() < self.vocab_size, "id outside the vocabulary"
        assert (mask is not None) == self.masked, "a mask belongs to chats, and only to them"
        shard = self._open or _OpenShard(self.folder, len(self._shards), self.masked)
        self._open = shard
        if self._at_document_start:
            shard.starts.append(shard.tokens)
            self.documents += 1
        shard.write(
            id_array.astype(self.dtype), None if mask is None else np.asarray(mask, dtype=np.uint8)
        )
        self.tokens += len(id_array)
        self.bytes += text_bytes
        self._at_document_start = last
        if shard.tokens >= self.shard_tokens:
            self._finish_shard()

    def close(self) -> None:
        """Finish the open shard and write the manifest."""
        self._finish_shard()
        manifest = {
            "format": FORMAT,
            "dtype": self.dtype.name,
            "vocab_size": self.vocab_size,
            "masked": self.masked,
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "shards": self._shards,
        }
        atomic_write(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")

    def _finish_shard(self) -> None:
        if self._open:
            self._shards.append(self._open.finish())
            self._open = None
            kill_point(f"shard {len(self._shards)}")

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ):
        if kind is None:
            self.close()
        elif self._open:
            self._open.abandon()


class _OpenShard:
    """The shard that is being written."""

    def __init__(self, folder: Path, index: int, masked: bool):
        self.name = f"{index:05d}"
        self.tokens = 0
        self.starts: list[int] = []
        self._files = {"tokens": _HashedFile(folder / f"{self.name}.tokens")}
        if masked:
            self._files["mask"] = _HashedFile(folder / f"{self.name}.mask")
        self._index_path = folder / f"{self.name}.index"

    def write(self, ids: NDArray[Any], mask: NDArray[np.uint8] | None) -> None:
        self._files["tokens"].write(ids.tobytes())
        if mask is not None:
            assert len(mask) == len(ids)
            self._files["mask"].write(mask.tobytes())
        self.tokens += len(ids)

    def finish(self) -> dict[str, Any]:
        """Write the index, close all files, and return the shard's entry in the manifest."""
        self._files["index"] = _HashedFile(self._index_path)
        self._files["index"].write(np.array(self.starts, dtype="<u8").tobytes())
        files = {file.path.name: file.finish() for file in self._files.values()}
        return {"tokens": self.tokens, "documents": len(self.starts), "files": files}

    def abandon(self) -> None:
        for file in self._files.values():
            file.handle.close()


class _HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path):
        self.path = path
        self.handle: BinaryIO = path.open("wb")
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes) -> None:
        self.handle.write(data)
        self._hash.update(data)
        self._bytes += len(data)

    def finish(self) -> dict[str, Any]:
        self.handle.close()
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}


class Shards:
    """A folder of shards as one memory-mapped stream of `tokens_total` tokens."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self.vocab_size: int = manifest["vocab_size"]
        self.masked: bool = manifest["masked"]
        self.tokens_total: int = manifest["tokens"]
        self.bytes_total: int = manifest["bytes"]
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        counts = [shard["tokens"] for shard in manifest["shards"]]
        self._offsets = np.cumsum([0, *counts])
        names = [f"{index:05d}" for index in range(len(counts))]
        self._tokens = [_map(folder / f"{name}.tokens", dtype) for name in names]
        self._mask = (
            [_map(folder / f"{name}.mask", np.dtype(np.uint8)) for name in names]
            if self.masked
            else []
        )
        starts = [np.fromfile(folder / f"{name}.index", dtype="<u8") for name in names]
        global_starts = [
            shard_starts.astype(np.int64) + offset
            for shard_starts, offset in zip(starts, self._offsets, strict=False)
        ]
        self.document_starts: NDArray[np.int64] = np.concatenate(
            [*global_starts, np.zeros(0, dtype=np.int64)]
        )
        """Offsets in the stream at which documents start, ascending, (documents,)."""

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> "Shards":
        """Memory-map a folder of shards. Sizes are always checked, hashes only with `verify`.

        Raise UserError, which names the file, if one is missing, has the wrong size or was changed.
        """
        manifest = _read_manifest(folder)
        for shard in manifest["shards"]:
            for name, expected in shard["files"].items():
                _check_file(inside(folder, name), expected, verify)
        return cls(folder, manifest)

    @property
    def document_lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each document, (documents,)."""
        return np.diff(self.document_starts, append=self.tokens_total)

    def tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the ids [start, stop) of the stream."""
        return self._read(self._tokens, start, stop).astype(np.int64)

    def mask(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return the loss mask of the ids [start, stop): True for trained tokens."""
        return self._read(self._mask, start, stop).astype(np.bool_)

    def _read(self, shard_arrays: list[NDArray[Any]], start: int, stop: int) -> NDArray[Any]:
        if not 0 <= start <= stop <= self.tokens_total:
            raise IndexError(f"tokens {start} to {stop} of {self.tokens_total}")
        if start == stop:
            return np.zeros(0, dtype=np.uint8)
        offsets = self._offsets
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        end = int(np.searchsorted(offsets, stop, side="left"))
        pieces = [
            shard_arrays[i][max(start - offsets[i], 0) : stop - offsets[i]]
            for i in range(first, end)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.memmap(path, dtype=dtype, mode="r")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `tinsmith prepare`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {_FIX.format(folder)}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path}: not a shard manifest of format {FORMAT}; {_FIX.format(folder)}")
    return manifest


def _check_file(path: Path, expected: dict[str, Any], verify: bool) -> None:
    fix = _FIX.format(path.parent)
    if not path.is_file():
        raise UserError(f"{path}: missing; {fix}")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise UserError(f"{path}: {size} bytes where {expected['bytes']} were written; {fix}")
    if verify and sha256(path) != expected["sha256"]:
        raise UserError(
            f"{path}: its content has changed since it was written (SHA-256 differs); {fix}"
        )

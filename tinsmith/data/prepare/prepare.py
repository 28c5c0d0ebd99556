"""Raw data -> tokenizer (if none is given) -> shards, in a folder named by all that decides them.

    ROOT/HASH/tokenizer.json ...            the tokenizer, as Hugging Face reads it
              report.json                   counts per source
              rejects.jsonl                 {file, line, reason} of every line that cannot be used
              0/train/ 0/validation/ 1/...  the shards of each source

A source is read up to three times: to find bad lines and plan the split, to train the tokenizer, to
encode. Memory is bounded by a batch of text, and by `max_bytes` while a tokenizer is trained.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinsmith.core.errors import UserError
from tinsmith.core.files import atomic_dir, atomic_write, free_space, remove_stale
from tinsmith.core.progress import Progress
from tinsmith.core.units import format_size
from tinsmith.data.config import DataConfig, DataFormat, HubData
from tinsmith.data.documents import DataSource, HubFetcher
from tinsmith.data.prepare.encode import MASKED_FORMATS, DocumentEncoder
from tinsmith.data.prepare.prepared import (
    PreparedData,
    Say,
    find_prepared,
    open_prepared,
    summarise,
)
from tinsmith.data.prepare.scan import RejectLog, ScanResult, scan_source
from tinsmith.data.prepare.tokenizer import (
    load_tokenizer_or_config,
    tokenizer_fingerprint,
    train_tokenizer,
)
from tinsmith.data.sources import hub
from tinsmith.data.streams import open_source, unique_names
from tinsmith.text.config import TokenizerConfig, TrainTokenizerConfig
from tinsmith.text.specials import our_template
from tinsmith.text.tokenizer import Tokenizer

FORMAT = 2
"""Part of the hash: raised whenever the same data would be written differently."""
SEQ_LEN_FORMATS: tuple[DataFormat, ...] = ("answers", "pairs", "prompts")
"""Shapes that are prepared for rows of one length."""

Stop = Callable[[], bool]


def prepare(
    data: DataConfig | tuple[DataConfig, ...],
    tokenizer: TokenizerConfig | Tokenizer,
    data_format: DataFormat,
    root: Path,
    say: Say = print,
    stop: Stop | None = None,
    *,
    seq_len: int | None = None,
) -> PreparedData:
    """Prepare `data` below `root`, or find it there.

    Answers, pairs and prompts are made to fit, and so depend on the `context` of the run: positions
    of a row.

    UserError for anything that the user can mend; Stopped where `stop()` turns true. Whatever
    happens, a folder named by its hash is complete, and what was there before stays.
    """
    scratch = root / f".fetched.tmp-{os.getpid()}"
    origins = _origins(data, data_format, _fetcher(scratch, say, stop))
    known = load_tokenizer_or_config(tokenizer)
    identities = [our_template(), *(origin.fingerprint for origin in origins)]
    sized = [seq_len] if data_format in SEQ_LEN_FORMATS else []
    assert sized != [None], f"{data_format} are prepared for a context"
    folder = root / _hash(FORMAT, data_format, tokenizer_fingerprint(known), identities, *sized)
    try:
        with _disk_trouble(root):
            remove_stale(root)
            found = find_prepared(folder, say)
            if found:
                return found
            with atomic_dir(folder) as temporary:
                _Work(temporary, data_format, seq_len, say, stop).run(origins, known)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    prepared = open_prepared(folder)
    summarise(prepared, say)
    return prepared


class _Work:
    """One preparation, from the first reading to the report."""

    def __init__(
        self, folder: Path, shape: DataFormat, context: int | None, say: Say, stop: Stop | None
    ):
        self._shape: DataFormat = shape
        self._context = context or 0
        self._folder, self._say, self._stop = folder, say, stop

    def run(self, origins: list[DataSource], known: Tokenizer | TrainTokenizerConfig) -> None:
        with RejectLog(self._folder / "rejects.jsonl") as rejects:
            scans = [
                scan_source(origin, self._shape, rejects, self._progress(f"reading {origin.name}"))
                for origin in origins
            ]
            made = known if isinstance(known, Tokenizer) else self._train(scans, known)
            made.save(self._folder)
            self._check_space(sum(scanned.bytes for scanned in scans), made)
            names = unique_names([origin.name for origin in origins])
            sources = [
                {"name": name} | self._encode(number, scanned, made, rejects)
                for number, (name, scanned) in enumerate(zip(names, scans, strict=True))
            ]
        report = {"format": FORMAT, "data_format": self._shape, "vocab_size": made.vocab_size}
        report |= {"tokenizer": made.fingerprint(), "sources": sources}
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        atomic_write(self._folder / "report.json", text)

    def _train(self, scans: list[ScanResult], settings: TrainTokenizerConfig) -> Tokenizer:
        total = sum(scanned.bytes for scanned in scans)
        amount, wanted = format_size(min(total, settings.max_bytes)), settings.vocab_size
        self._say(f" prepare   training a tokenizer of {wanted} ids on {amount}")
        documents = (item for scanned in scans for item in scanned.split_documents())
        progress = self._progress("reading for the tokenizer", total)
        made = train_tokenizer(settings, documents, total, progress)
        if made.vocab_size < wanted:
            self._say(f" prepare   there is too little text for more than {made.vocab_size} ids")
        return made

    def _encode(
        self, number: int, scanned: ScanResult, tokenizer: Tokenizer, rejects: RejectLog
    ) -> dict[str, Any]:
        origin = scanned.source
        encoder = DocumentEncoder(self._folder / str(number), tokenizer, self._shape, self._context)
        progress = self._progress(f"encoding {origin.name}", scanned.bytes)
        counts = encoder.write(scanned.split_documents(), progress)
        for reject in encoder.rejects:
            rejects.add(origin, reject)
        if not counts["train"]["documents"]:
            raise UserError(f"data: nothing of '{origin.display_name}' is left to train on")
        rejected = scanned.rejected + len(encoder.rejects)
        config = origin.config
        return {"kind": config.kind, "weight": config.weight, "rejected": rejected} | counts

    def _check_space(self, text_bytes: int, tokenizer: Tokenizer) -> None:
        """Refuse early what cannot fit, at two bytes of text to a token."""
        token_bytes = (2 if tokenizer.vocab_size <= 2**16 else 4) + (self._shape in MASKED_FORMATS)
        need, free = text_bytes * token_bytes // 2, free_space(self._folder)
        if free < need:
            needed, there = format_size(need), format_size(free)
            root = self._folder.parent
            raise UserError(f"{root}: no space: shards need about {needed}, {there} are free")

    def _progress(self, what: str, total: int | None = None) -> Progress:
        return Progress(what, total, self._say, self._stop)


def _origins(
    data: DataConfig | tuple[DataConfig, ...], shape: DataFormat, fetched: HubFetcher
) -> list[DataSource]:
    sections = data if isinstance(data, tuple) else (data,)
    if not sections:
        raise UserError("data: the list is empty; name at least one source")
    count = len(sections)
    keys = ["data"] if count == 1 else [f"data.{number}" for number in range(count)]
    pairs = zip(sections, keys, strict=True)
    return [open_source(section, shape, key, fetched) for section, key in pairs]


def _fetcher(scratch: Path, say: Say, stop: Stop | None) -> HubFetcher:
    """Fetches a Hub data set into `scratch` when its rows are first asked for."""

    def fetched(config: HubData) -> Path:
        path = scratch / f"{_hash(hub.label(config), config.limit)}.jsonl"
        if not path.exists():
            scratch.mkdir(parents=True, exist_ok=True)
            hub.fetch(config, path, say, stop)
        return path

    return fetched


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _disk_trouble(root: Path) -> Iterator[None]:
    """What the disk refuses becomes one line for a person."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = format_size(free_space(root))
            raise UserError(f"{root}: the disk is full, {free} free; nothing was changed") from None
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise UserError(f"{error.filename or root}: {error.strerror}") from None
        raise

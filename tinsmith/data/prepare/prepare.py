"""Prepare data: raw files to a tokenizer (unless one is given) and token shards, in a folder named
by the hash of everything that determines them.

    ROOT/HASH/tokenizer.json ...            the tokenizer, in Hugging Face's format
              report.json                   counts per source
              rejects.jsonl                 {file, line, reason} of every line that cannot be used
              0/train/ 0/validation/ 1/...  the shards of each source

A source is read up to three times: to find bad lines and plan the split, to train the tokenizer, to
encode. Memory is limited to a batch of text, and to `max_bytes` while a tokenizer is trained.
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
from tinsmith.data.formats import FORMATS, FormatName
from tinsmith.data.prepare.encode import DocumentEncoder
from tinsmith.data.prepare.prepared import (
    PreparedData,
    Say,
    find_prepared,
    open_prepared,
    summarise,
)
from tinsmith.data.prepare.scan import RejectLog, ScanResult, format_reject, scan_source
from tinsmith.data.prepare.tokenizer import (
    load_tokenizer_or_config,
    tokenizer_fingerprint,
    train_tokenizer,
)
from tinsmith.data.sources import DataConfig, DataSource, SourceContext, open_source
from tinsmith.data.sources.base import unique_names
from tinsmith.text.config import TokenizerConfig, TrainTokenizerConfig
from tinsmith.text.specials import our_template
from tinsmith.text.tokenizer import Tokenizer

FORMAT = 4
"""Version of prepared folders, part of the hash: raise it when the same data are written in another
way.
"""

Stop = Callable[[], bool]


def prepare(
    data: DataConfig | tuple[DataConfig, ...],
    tokenizer: TokenizerConfig | TrainTokenizerConfig | Tokenizer,
    data_format: FormatName,
    root: Path,
    say: Say = print,
    stop: Stop | None = None,
    *,
    seq_len: int | None = None,
) -> PreparedData:
    """Prepare `data` below `root`, or find the folder that is there already.

    `seq_len` is needed by formats whose samples must fit into one row (`DataFormat.needs_seq_len`).
    Raise UserError for bad input, and Stopped when `stop()` returns True. A folder named by its
    hash is always complete, and an interrupted preparation changes no other folder.
    """
    download_dir = root / f".fetched.tmp-{os.getpid()}"
    sources = _open_sources(data, data_format, download_dir, say, stop)
    known = load_tokenizer_or_config(tokenizer)
    identities = [our_template(), *(source.fingerprint for source in sources)]
    lengths = [seq_len] if FORMATS[data_format].needs_seq_len else []
    assert lengths != [None], f"{data_format} are prepared for a sequence length"
    folder = root / _hash(FORMAT, data_format, tokenizer_fingerprint(known), identities, *lengths)
    try:
        with _report_disk_errors(root):
            remove_stale(root)
            prepared = find_prepared(folder, say)
            if prepared:
                return prepared
            with atomic_dir(folder) as temporary:
                _Preparation(temporary, data_format, seq_len, say, stop).run(sources, known)
    finally:
        shutil.rmtree(download_dir, ignore_errors=True)
    prepared = open_prepared(folder)
    summarise(prepared, say)
    return prepared


class _Preparation:
    """One preparation, from scanning to the report."""

    def __init__(
        self,
        folder: Path,
        data_format: FormatName,
        seq_len: int | None,
        say: Say,
        stop: Stop | None,
    ):
        self._format_name, self._format = data_format, FORMATS[data_format]
        self._seq_len = seq_len or 0
        self._folder, self._say, self._stop = folder, say, stop

    def run(self, sources: list[DataSource], known: Tokenizer | TrainTokenizerConfig) -> None:
        """Scan the sources, train the tokenizer if none is known, encode, and write the report."""
        for source in sources:
            if source.files is not None:
                self._say(f" prepare   {source.name}: {source.files}")
        with RejectLog(self._folder / "rejects.jsonl") as rejects:
            scans = [
                scan_source(source, rejects, self._progress(f"reading {source.name}"))
                for source in sources
            ]
            tokenizer = known if isinstance(known, Tokenizer) else self._train(scans, known)
            tokenizer.save(self._folder)
            self._check_space(sum(scan.bytes for scan in scans), tokenizer)
            names = unique_names([source.name for source in sources])
            entries = [
                {"name": name} | self._encode(number, scan, tokenizer, rejects)
                for number, (name, scan) in enumerate(zip(names, scans, strict=True))
            ]
        report = {
            "format": FORMAT,
            "data_format": self._format_name,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.fingerprint(),
            "sources": entries,
        }
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        atomic_write(self._folder / "report.json", text)

    def _train(self, scans: list[ScanResult], config: TrainTokenizerConfig) -> Tokenizer:
        total = sum(scan.bytes for scan in scans)
        size = f"at most {format_size(min(total, config.max_bytes))}"
        self._say(f" prepare   training a tokenizer of {config.vocab_size} ids on {size}")
        documents = (item for scan in scans for item in scan.split_documents())
        progress = self._progress("reading for the tokenizer", total)
        tokenizer, num_bytes = train_tokenizer(config, documents, total, progress)
        self._say(f" prepare   trained the tokenizer on {format_size(num_bytes)} of text")
        if tokenizer.vocab_size < config.vocab_size:
            self._say(f" prepare   too little text for more than {tokenizer.vocab_size} ids")
        return tokenizer

    def _encode(
        self, number: int, scan: ScanResult, tokenizer: Tokenizer, rejects: RejectLog
    ) -> dict[str, Any]:
        """Encode one source and return its entry in the report."""
        source = scan.source
        encoder = DocumentEncoder(
            self._folder / str(number), tokenizer, self._format, self._seq_len
        )
        progress = self._progress(f"encoding {source.name}", scan.bytes)
        counts = encoder.write(scan.split_documents(), progress)
        for reject in encoder.rejects:
            rejects.add(source, reject)
        if not counts["train"]["documents"]:
            first = encoder.rejects[:1]
            why = "".join(f"; the first bad line is {format_reject(reject)}" for reject in first)
            raise UserError(f"data: nothing in '{source.display_name}' is left to train on{why}")
        rejected = scan.rejected + len(encoder.rejects)
        config = source.config
        entry = {"kind": config.kind, "weight": config.weight, "rejected": rejected}
        entry["reject_reasons"] = dict(rejects.reasons[id(source)].most_common(5))
        return entry | {"never_read": dict(scan.unread.most_common())} | counts

    def _check_space(self, text_bytes: int, tokenizer: Tokenizer) -> None:
        """Raise UserError if the disk is too small, assuming two bytes of text per token."""
        token_bytes = (2 if tokenizer.vocab_size <= 2**16 else 4) + self._format.masked
        required, free = text_bytes * token_bytes // 2, free_space(self._folder)
        if free < required:
            root = self._folder.parent
            raise UserError(
                f"{root}: no space: shards need about {format_size(required)}, "
                f"{format_size(free)} are free"
            )

    def _progress(self, activity: str, total: int | None = None) -> Progress:
        return Progress(activity, total, self._say, self._stop)


def _open_sources(
    data: DataConfig | tuple[DataConfig, ...],
    data_format: FormatName,
    download_dir: Path,
    say: Say,
    stop: Stop | None,
) -> list[DataSource]:
    configs = data if isinstance(data, tuple) else (data,)
    if not configs:
        raise UserError("data: the list is empty; name at least one source")
    keys = ["data"] if len(configs) == 1 else [f"data.{index}" for index in range(len(configs))]
    return [
        open_source(config, data_format, SourceContext(key, download_dir, say, stop))
        for config, key in zip(configs, keys, strict=True)
    ]


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _report_disk_errors(root: Path) -> Iterator[None]:
    """Turn errors of the disk into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = format_size(free_space(root))
            raise UserError(f"{root}: the disk is full, {free} free; nothing was changed") from None
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise UserError(f"{error.filename or root}: {error.strerror}") from None
        raise

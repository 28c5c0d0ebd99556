"""Raw data -> tokenizer (if none is given) -> shards, in a folder named by the hash of all that decides its content.

    ROOT/HASH/tokenizer.json ...            the tokenizer, as Hugging Face reads it
              report.json                   counts per source
              rejects.jsonl                 {file, line, reason} of every line that could not be used
              0/train/ 0/validation/ 1/...  the shards of each source

A source is read up to three times: to find bad lines and plan the split, to train the tokenizer, to encode. Memory is
bounded by a batch of text, except that a tokenizer is trained on at most `max_bytes`.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.core.files import atomic_dir, atomic_write, free_space, sweep
from tinsmith.core.units import size
from tinsmith.data import hub
from tinsmith.data.config import DataConfig, Hub, Shape
from tinsmith.data.encode import Encoder
from tinsmith.data.files import Reject
from tinsmith.data.prepared import Prepared, Say, find_prepared, open_prepared, summarise
from tinsmith.data.progress import Progress
from tinsmith.data.split import NO_SPLIT, Scan, Split, digest, plan, sampled
from tinsmith.data.streams import Document, Origin, Stream, open_origin, unique_names
from tinsmith.text.bpe import train_bpe
from tinsmith.text.config import TokenizerConfig, TrainTokenizerConfig
from tinsmith.text.tokenizer import Tokenizer

FORMAT = 1
"""Part of the hash: raised whenever the same data would be written differently."""

Stop = Callable[[], bool]


class _Plan(NamedTuple):
    """A source after its first reading: where its documents go, and how much there is."""

    origin: Origin
    split: Split
    train: Scan
    validation: Scan | None

    @property
    def bytes(self) -> int:
        return self.train.bytes + (self.validation.bytes if self.validation else 0)

    def sides(self) -> Iterator[tuple[bool, Document]]:
        """(whether it is for validation, document) of all usable documents."""
        yield from self.split.sides(_usable(self.origin.train))
        if self.origin.validation:
            yield from ((True, document) for document in _usable(self.origin.validation))


def prepare(
    data: DataConfig | tuple[DataConfig, ...],
    tokenizer: TokenizerConfig | Tokenizer,
    shape: Shape,
    root: Path,
    say: Say = print,
    stop: Stop | None = None,
) -> Prepared:
    """Prepare `data` below `root`, or find it there.

    UserError for anything that the user can mend; Stopped where `stop()` turns true. Whatever happens, a folder named
    by its hash is complete, and what was there before stays.
    """
    sections = data if isinstance(data, tuple) else (data,)
    if not sections:
        raise UserError("data: the list is empty; name at least one source")
    scratch = root / f".fetched.tmp-{os.getpid()}"

    def fetched(config: Hub) -> Path:
        path = scratch / f"{_hash(hub.label(config), config.limit)}.jsonl"
        if not path.exists():
            scratch.mkdir(parents=True, exist_ok=True)
            hub.fetch(config, path, say, stop)
        return path

    keys = ["data"] if len(sections) == 1 else [f"data.{number}" for number in range(len(sections))]
    origins = [
        open_origin(section, shape, key, fetched)
        for section, key in zip(sections, keys, strict=True)
    ]
    given = _given(tokenizer)
    folder = root / _hash(
        FORMAT,
        shape,
        _tokenizer_identity(tokenizer, given),
        [origin.identity for origin in origins],
    )
    try:
        with _disk_trouble(root):
            sweep(root)
            found = find_prepared(folder, say)
            if found:
                return found
            with atomic_dir(folder) as temporary:
                _Work(temporary, shape, say, stop).run(origins, tokenizer, given)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    prepared = open_prepared(folder)
    summarise(prepared, say)
    return prepared


class _Work:
    """One preparation, from the first reading to the report."""

    def __init__(self, folder: Path, shape: Shape, say: Say, stop: Stop | None):
        self._folder, self._shape, self._say, self._stop = folder, shape, say, stop
        self._rejects = (folder / "rejects.jsonl").open("w", encoding="utf-8")
        self._rejected = 0

    def run(
        self, origins: list[Origin], tokenizer: TokenizerConfig | Tokenizer, given: Tokenizer | None
    ) -> None:
        with self._rejects:
            plans, rejected = [], []
            for origin in origins:
                before = self._rejected
                plans.append(self._plan(origin))
                rejected.append(self._rejected - before)
            made = given or self._train(plans, tokenizer)
            made.save(self._folder)
            self._check_space(sum(plan.bytes for plan in plans), made)
            sources = []
            names = unique_names([origin.name for origin in origins])
            for number, (name, planned) in enumerate(zip(names, plans, strict=True)):
                before = self._rejected
                facts = self._encode(number, planned, made)
                rejects = rejected[number] + self._rejected - before
                config = planned.origin.config
                sources.append(
                    {
                        "name": name,
                        "kind": config.kind,
                        "weight": config.weight,
                        "rejected": rejects,
                    }
                    | facts
                )
        report = {"format": FORMAT, "shape": self._shape, "vocab_size": made.vocab_size}
        report |= {"tokenizer": made.fingerprint(), "sources": sources}
        atomic_write(
            self._folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        )

    def _plan(self, origin: Origin) -> _Plan:
        validation = self._scan(origin, origin.validation) if origin.validation else None
        train = self._scan(origin, origin.train)
        fraction = origin.config.validation
        if origin.validation or isinstance(fraction, str):
            return _Plan(origin, NO_SPLIT, train, validation)
        may_cut = self._shape == "documents" and origin.config.kind == "text"
        return _Plan(origin, plan(train, fraction, may_cut=may_cut), train, None)

    def _scan(self, origin: Origin, stream: Stream) -> Scan:
        """Read everything once: count, report what is bad, find the range of digests."""
        progress = Progress(f"reading {origin.name}", None, self._say, self._stop)
        documents = characters = total = 0
        lowest, highest = 2**64, -1
        first_reject = None
        for item in stream():
            if isinstance(item, Reject):
                first_reject = first_reject or item
                self._reject(origin, item)
                continue
            if item.first:
                number = digest(item)
                lowest, highest = min(lowest, number), max(highest, number)
            documents += item.last
            characters += len(item.content) if isinstance(item.content, str) else 0
            total += item.bytes
            progress.advance(item.bytes)
        if not documents:
            why = (
                f"; the first bad line is {_place(first_reject)}"
                if first_reject
                else ", it is empty"
            )
            raise UserError(f"data: nothing in '{_described(origin)}' can be used{why}")
        return Scan(documents, characters, total, lowest, highest)

    def _train(self, plans: list[_Plan], tokenizer: TokenizerConfig | Tokenizer) -> Tokenizer:
        """Train a BPE on a random sample, of at most `max_bytes`, of all documents that are trained on."""
        assert isinstance(tokenizer, TokenizerConfig)
        settings = tokenizer.train or TrainTokenizerConfig()
        total = sum(plan.bytes for plan in plans)
        self._say(
            f" prepare   training a tokenizer of {settings.vocab_size} on {size(min(total, settings.max_bytes))}"
        )
        made = train_bpe(self._sample(plans, settings.max_bytes), settings.vocab_size)
        if made.vocab_size < settings.vocab_size:
            self._say(
                f" prepare   the text has only {made.vocab_size} different pieces: the vocabulary is that small"
            )
        return made

    def _sample(self, plans: list[_Plan], most: int) -> Iterator[str]:
        total = sum(plan.bytes for plan in plans)
        share = most / total
        progress = Progress("reading for the tokenizer", total, self._say, self._stop)
        taken = 0
        for held_back, document in (item for plan in plans for item in plan.sides()):
            progress.advance(document.bytes)
            if held_back or (share < 1 and not sampled(document, share)):
                continue
            taken += document.bytes
            if taken > most and taken > document.bytes:
                return
            yield from [document.text] if isinstance(document.content, str) else _said(document)

    def _encode(self, number: int, planned: _Plan, tokenizer: Tokenizer) -> dict[str, Any]:
        origin = planned.origin
        progress = Progress(f"encoding {origin.name}", planned.bytes, self._say, self._stop)
        encoder = Encoder(self._folder / str(number), tokenizer, self._shape)
        facts = encoder.write(planned.sides(), progress)
        for reject in encoder.rejects:
            self._reject(origin, reject)
        if not facts["train"]["documents"]:
            raise UserError(
                f"data: nothing is left of '{_described(origin)}' to train on; lower data.validation"
            )
        return facts

    def _reject(self, origin: Origin, reject: Reject) -> None:
        if origin.fails:
            raise UserError(f"{_place(reject)}; mend it, or set data.on_bad_line: reject")
        self._rejects.write(json.dumps(reject._asdict(), ensure_ascii=False) + "\n")
        self._rejected += 1

    def _check_space(self, text_bytes: int, tokenizer: Tokenizer) -> None:
        """Refuse early what cannot fit: about two bytes of text to a token, and a token's bytes."""
        token_bytes = (2 if tokenizer.vocab_size <= 2**16 else 4) + (self._shape == "chats")
        need, free = text_bytes * token_bytes // 2, free_space(self._folder)
        if free < need:
            raise UserError(
                f"{self._folder.parent}: no space: shards need about {size(need)}, {size(free)} are free"
            )


def _given(tokenizer: TokenizerConfig | Tokenizer) -> Tokenizer | None:
    """The tokenizer, unless it is to be trained."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    return Tokenizer.load(tokenizer.path) if tokenizer.path else None


def _tokenizer_identity(tokenizer: TokenizerConfig | Tokenizer, given: Tokenizer | None) -> Any:
    if given:
        return given.fingerprint()
    assert isinstance(tokenizer, TokenizerConfig)
    settings = tokenizer.train or TrainTokenizerConfig()
    return [settings.vocab_size, settings.max_bytes]


def _usable(stream: Stream) -> Iterator[Document]:
    return (item for item in stream() if isinstance(item, Document))


def _said(document: Document) -> list[str]:
    assert not isinstance(document.content, str)
    return [
        text
        for message in document.content.messages
        for text in (message.reasoning, message.content)
        if text
    ]


def _place(reject: Reject) -> str:
    return f"{reject.file}:{reject.line}: {reject.reason}"


def _described(origin: Origin) -> str:
    config = origin.config
    return config.path if config.kind in ("text", "chats") else origin.name


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _disk_trouble(root: Path) -> Iterator[None]:
    """What the disk refuses becomes one line for a person."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = size(free_space(root))
            raise UserError(
                f"{root}: the disk is full ({free} free); free some space, nothing was changed"
            ) from None
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise UserError(f"{error.filename or root}: {error.strerror}") from None
        raise

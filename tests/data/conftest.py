import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from tinsmith.data.prepare.prepare import prepare
from tinsmith.data.prepare.shards import Shards, ShardWriter
from tinsmith.text.bpe import train_bpe

STORIES = [
    f"Once there was a {a} {b} who lived in the {c}. It was {a} and liked to eat {d}.\n"
    for a in ("small", "green", "sleepy", "brave")
    for b in ("fox", "hen", "goat")
    for c in ("wood", "town", "hills")
    for d in ("nuts", "pie")
]


@pytest.fixture(scope="session")
def stories():
    return STORIES


@pytest.fixture(scope="session")
def tokenizer():
    return train_bpe(STORIES, 320)


@pytest.fixture
def write_lines(tmp_path):
    """Writes objects (as JSON) or bytes (as they are), one per line, and gives the path."""

    def write(name, lines, start=b""):
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path = tmp_path / name
        path.write_bytes(start + b"".join(line + b"\n" for line in raw))
        return path

    return write


@pytest.fixture
def story_file(write_lines, stories):
    return write_lines("stories.jsonl", [{"text": text} for text in stories])


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """`prepare` into a folder of the test's own, silently."""

    def run(data, data_format="documents", tokenizer=tokenizer, **options):
        return prepare(
            data, tokenizer, data_format, tmp_path / "data", say=lambda line: None, **options
        )

    return run


@pytest.fixture
def texts_of():
    """The texts of all documents of a side of a prepared source, decoded from its shards."""

    def read(prepared_data, split, source_index=0):
        shards = Shards.open(prepared_data.folder / str(source_index) / split, verify=True)
        offsets = [*shards.document_starts.tolist(), shards.tokens_total]
        ids = [shards.tokens(a, b).tolist() for a, b in itertools.pairwise(offsets)]
        return [
            prepared_data.tokenizer.decode(document_ids).removesuffix("<|endoftext|>")
            for document_ids in ids
        ]

    return read


@pytest.fixture
def rejects_of():
    """(file name, line, reason) of everything in rejects.jsonl."""

    def read(prepared_data):
        lines = (prepared_data.folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        return [(Path(record["file"]).name, record["line"], record["reason"]) for record in records]

    return read


@pytest.fixture
def make_shards(tmp_path):
    """Shards of given documents; with masks, of chats."""

    def make(documents, masks=None, vocab_size=1000, shard_tokens=64, name="shards"):
        with ShardWriter(
            tmp_path / name, vocab_size, masked=masks is not None, shard_tokens=shard_tokens
        ) as writer:
            for index, ids in enumerate(documents):
                writer.add(ids, None if masks is None else masks[index], text_bytes=len(ids))
        return Shards.open(tmp_path / name, verify=True)

    return make


@pytest.fixture
def random_documents():
    def make(seed, count, max_length):
        rng = np.random.default_rng(seed)
        return [rng.integers(3, 1000, rng.integers(1, max_length + 1)) for _ in range(count)]

    return make

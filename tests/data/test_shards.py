import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinsmith.core.errors import UserError
from tinsmith.data.prepare.shards import Shards, ShardWriter

documents_strategy = st.lists(
    st.lists(st.integers(0, 70_000), min_size=1, max_size=40), min_size=1, max_size=12
)


@given(documents_strategy, st.integers(1, 50), st.data())
@settings(
    derandomize=True,
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_range_of_the_stream_reads_back(tmp_path_factory, documents, shard_tokens, data):
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, 70_001, masked=True, shard_tokens=shard_tokens) as writer:
        for ids in documents:
            half = len(ids) // 2
            if half:  # a document may be written in parts, and continue in the next shard
                writer.add(ids[:half], [True] * half, last=False)
            writer.add(ids[half:], [i % 2 for i in ids[half:]], text_bytes=3)
    shards = Shards.open(folder, verify=True)
    stream = [token for ids in documents for token in ids]
    mask = [
        m
        for ids in documents
        for m in [True] * (len(ids) // 2) + [bool(i % 2) for i in ids[len(ids) // 2 :]]
    ]
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert shards.tokens(start, stop).tolist() == stream[start:stop]
    assert shards.mask(start, stop).tolist() == mask[start:stop]
    assert shards.document_lengths.tolist() == [len(ids) for ids in documents]
    assert (shards.tokens_total, shards.bytes_total) == (len(stream), 3 * len(documents))


@pytest.mark.parametrize(("vocab_size", "width"), [(65_536, 2), (65_537, 4)])
def test_tokens_take_two_bytes_up_to_65536_ids(tmp_path, vocab_size, width):
    with ShardWriter(tmp_path, vocab_size) as writer:
        writer.add([0, vocab_size - 1, 1])
    assert (tmp_path / "00000.tokens").stat().st_size == 3 * width
    assert Shards.open(tmp_path).tokens(0, 3).tolist() == [0, vocab_size - 1, 1]


def test_tokens_on_disk_are_raw_little_endian(tmp_path):
    with ShardWriter(tmp_path, 1000) as writer:
        writer.add([1, 258])
        writer.add([3])
    assert (tmp_path / "00000.tokens").read_bytes() == bytes([1, 0, 2, 1, 3, 0])
    assert (tmp_path / "00000.index").read_bytes() == bytes([0] * 8 + [2] + [0] * 7)


def test_an_id_outside_of_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(AssertionError), ShardWriter(tmp_path, 10) as writer:
        writer.add([10])


def test_shards_without_documents_are_an_empty_stream(make_shards):
    shards = make_shards([])
    assert (shards.tokens_total, len(shards.document_starts), len(shards.document_lengths)) == (
        0,
        0,
        0,
    )


def test_a_failed_write_leaves_no_manifest(tmp_path):
    with pytest.raises(AssertionError), ShardWriter(tmp_path, 10) as writer:
        writer.add([])
    assert not (tmp_path / "shards.json").exists()


def flip_bit(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["00001.tokens", "00000.index", "00001.mask"])
@pytest.mark.parametrize("damage", [cut_short, lambda p: p.write_bytes(b""), lambda p: p.unlink()])
def test_T9_a_shard_of_the_wrong_size_is_always_detected(
    make_shards, random_documents, name, damage
):
    documents = random_documents(0, 20, 20)
    shards = make_shards(documents, [np.ones(len(ids)) for ids in documents])
    damage(shards.folder / name)
    with pytest.raises(UserError, match=rf"{name}: .*run `tinsmith prepare` again"):
        Shards.open(shards.folder)


@pytest.mark.parametrize("name", ["00001.tokens", "00000.index", "00001.mask"])
def test_T9_shard_corruption_is_detected_by_hash(make_shards, random_documents, name):
    documents = random_documents(0, 20, 20)
    shards = make_shards(documents, [np.ones(len(ids)) for ids in documents])
    flip_bit(shards.folder / name)
    Shards.open(shards.folder)
    with pytest.raises(UserError, match=rf"{name}: .*run `tinsmith prepare` again"):
        Shards.open(shards.folder, verify=True)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 99}', "\x00"])
def test_T9_a_damaged_manifest_is_a_one_line_error(make_shards, content):
    folder = make_shards([[1, 2]]).folder
    (folder / "shards.json").write_text(content)
    with pytest.raises(UserError, match=r"shards\.json: .*prepare"):
        Shards.open(folder)


def test_a_manifest_cannot_name_files_outside_its_folder(make_shards):
    folder = make_shards([[1, 2]]).folder
    manifest = json.loads((folder / "shards.json").read_text())
    manifest["shards"][0]["files"] = {"../../x": {"bytes": 1, "sha256": ""}}
    (folder / "shards.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="leads out"):
        Shards.open(folder)


def test_a_missing_folder_is_an_error_with_advice(tmp_path):
    with pytest.raises(UserError, match="run `tinsmith prepare`"):
        Shards.open(tmp_path / "none")

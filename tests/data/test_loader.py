import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.core.errors import UserError
from tinsmith.data.loader.batch import Batch
from tinsmith.data.loader.loader import open_dataset
from tinsmith.data.loader.mixture import BLOCK_SIZE, Mixture, quotas
from tinsmith.data.prepare.shards import ShardWriter

SEQ_LEN = 16
SIZES = {"first": 700, "second": 300, "third": 45}
WEIGHTS = {"first": 2.0, "second": 1.0, "third": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sources with tokens that encode source and position."""
    root = tmp_path_factory.mktemp("prepared")
    offset = 3
    for source_index, tokens in enumerate(SIZES.values()):
        for split, count in (("train", tokens), ("validation", tokens // 10)):
            with ShardWriter(root / str(source_index) / split, 3000, shard_tokens=50) as writer:
                for start in range(0, count, 7):
                    writer.add(np.arange(start, min(start + 7, count)) + offset)
                offset += count
    sources = [{"name": name, "weight": WEIGHTS[name]} for name in SIZES]
    report = {"data_format": "documents", "sources": sources}
    (root / "report.json").write_text(json.dumps(report))
    return root


@pytest.fixture
def dataset(folder):
    return open_dataset(folder, "documents", "train", SEQ_LEN, 5)


def equal_batches(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def concatenate_batches(batches):
    return Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def test_a_batch_has_the_documented_shapes_and_dtypes(dataset):
    batch = dataset.get_batch(0, 6)
    for part in batch[:5]:
        assert part.shape == (6, SEQ_LEN)
    assert batch.source.shape == (6,)
    assert [part.dtype for part in batch] == [
        *(torch.int64, torch.int64, torch.bool, torch.int64, torch.int64, torch.int64)
    ]
    assert equal_batches(concatenate_batches(batch.split(4)), batch)


@pytest.mark.parametrize("index", [0, 1, 999, 1000, 123_456, 10**12])
def test_a_resumed_dataset_continues_with_the_same_rows(folder, index):
    before = open_dataset(folder, "documents", "train", SEQ_LEN, 5).get_batch(index, 40)
    resumed = open_dataset(folder, "documents", "train", SEQ_LEN, 5)
    assert equal_batches(
        concatenate_batches([resumed.get_batch(index + 23, 17)]), before.rows(23, 40)
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_divide_the_same_global_order(dataset, world_size):
    step = 32
    global_batch = dataset.get_batch(0, 3 * step)
    rank_batches = []
    for start in range(0, 3 * step, step):
        rank_batches += [
            dataset.get_batch(start + r * step // world_size, step // world_size)
            for r in range(world_size)
        ]
    assert equal_batches(concatenate_batches(rank_batches), global_batch)


def test_the_order_depends_on_the_seed(folder):
    first, second = (
        open_dataset(folder, "documents", "train", SEQ_LEN, seed).get_batch(0, 64)
        for seed in (5, 6)
    )
    assert not torch.equal(first.ids, second.ids)


def test_an_epoch_contains_every_row_once_and_the_next_one_is_reshuffled(dataset):
    single = dataset.subset("first")
    assert single.size == -(-SIZES["first"] // SEQ_LEN)
    epochs = [single.get_batch(e * single.size, single.size) for e in range(2)]
    for batch in epochs:
        ids = batch.ids[batch.segments >= 0]
        assert sorted(ids.tolist()) == list(range(3, 3 + SIZES["first"]))
    assert not torch.equal(epochs[0].ids, epochs[1].ids)
    assert single.epoch_of(single.size * 3 // 2) == pytest.approx(1.5, abs=0.02)


def test_each_source_of_a_mixture_has_its_own_epochs(dataset):
    batch = dataset.get_batch(0, 3000)
    for source_index, name in enumerate(SIZES):
        mixed_ids = batch.ids[batch.source == source_index]
        alone = open_like(dataset, name).get_batch(0, len(mixed_ids))
        assert torch.equal(mixed_ids, alone.ids)


def open_like(dataset, name):
    return dataset.subset(name)


def test_cursors_count_the_samples_of_each_source(dataset):
    batch = dataset.get_batch(0, 2500)
    for index in (0, 1, 17, 999, 1000, 1001, 2345):
        expected = torch.bincount(batch.source[:index], minlength=3).tolist()
        assert list(dataset.cursors(index).values()) == expected
        assert list(dataset.cursors(index)) == dataset.names == list(SIZES)


def test_every_block_has_the_exact_quota_of_each_source(dataset):
    counts = torch.bincount(dataset.get_batch(BLOCK_SIZE, BLOCK_SIZE).source, minlength=3).tolist()
    assert counts == quotas(list(WEIGHTS.values())).tolist() == [606, 303, 91]


def test_every_block_is_mixed_in_another_order():
    mixture = Mixture([1.0, 1.0], 0)
    sources, _ = mixture.locate(np.arange(3 * BLOCK_SIZE))
    first, second, third = sources.reshape(3, BLOCK_SIZE)
    for one, other in ((first, second), (second, third)):
        assert 0.4 < (one == other).mean() < 0.6


def test_sources_of_equal_size_are_shuffled_differently(tmp_path):
    for number in range(2):
        with ShardWriter(tmp_path / str(number) / "train", 3000) as writer:
            writer.add(np.arange(400))
    sources = [{"name": name, "weight": 1.0} for name in "ab"]
    (tmp_path / "report.json").write_text(
        json.dumps({"data_format": "documents", "sources": sources})
    )
    both = open_dataset(tmp_path, "documents", "train", 4, 0)
    a, b = (both.subset(name).get_batch(0, 100).ids for name in "ab")
    assert (a == b).all(dim=1).float().mean() < 0.1


def test_sources_are_mixed_evenly_within_a_block(dataset):
    sources = dataset.get_batch(0, BLOCK_SIZE).source
    halves = [torch.bincount(half, minlength=3) for half in sources.split(BLOCK_SIZE // 2)]
    assert (halves[0] - halves[1]).abs().max() < 80


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=20))
@settings(derandomize=True, max_examples=200)
def test_quotas_sum_to_the_block_size_and_are_positive(weights):
    block_quotas = quotas(weights)
    assert block_quotas.sum() == BLOCK_SIZE
    assert (block_quotas >= 1).all()
    exact = np.array(weights) / sum(weights) * BLOCK_SIZE
    assert (np.abs(block_quotas - exact) < 1 + len(weights)).all()


@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.integers(0, 50_000), st.integers(0, 9)
)
@settings(derandomize=True, max_examples=50, deadline=None)
def test_source_indices_are_consecutive(weights, start, seed):
    mixture = Mixture(weights, seed)
    sources, indices = mixture.locate(np.arange(start, start + 1500))
    cursors = mixture.cursors(start)
    for dataset, first in enumerate(cursors):
        of_source = indices[sources == dataset]
        assert np.array_equal(of_source, first + np.arange(len(of_source)))


def test_validation_contains_every_row_once_in_order(folder):
    validation = open_dataset(folder, "documents", "validation", SEQ_LEN, 5)
    batches = list(validation.iter_batches(3))
    assert sum(len(batch.ids) for batch in batches) == validation.size
    ids = torch.cat([batch.ids[batch.segments >= 0] for batch in batches])
    assert (ids.diff() > 0).all()
    assert len(ids) == validation.tokens == sum(tokens // 10 for tokens in SIZES.values())
    assert equal_batches(validation.get_batch(0, 10**6), concatenate_batches(batches))


def test_validation_is_the_same_for_every_seed(folder):
    first, second = (
        open_dataset(folder, "documents", "validation", SEQ_LEN, seed) for seed in (1, 2)
    )
    assert equal_batches(first.get_batch(0, 99), second.get_batch(0, 99))


def test_subset_gives_the_validation_rows_of_one_source(folder):
    validation = open_dataset(folder, "documents", "validation", SEQ_LEN, 5)
    for number, name in enumerate(SIZES):
        alone = validation.subset(name)
        assert alone.names == [name]
        assert set(alone.get_batch(0, alone.size).source.tolist()) == {number}


def test_a_limited_pass_is_spread_evenly(folder):
    first = open_dataset(folder, "documents", "validation", SEQ_LEN, 5).subset("first")
    assert first.evenly_spaced(2).tolist() == [0, first.size // 2]
    assert first.evenly_spaced(100).tolist() == list(range(first.size))
    assert sum(len(batch.ids) for batch in first.iter_batches(2, max_samples=3)) == 3


def test_a_split_without_rows_is_a_one_line_error(folder, tmp_path):
    for split in ("train", "validation"):
        with ShardWriter(tmp_path / "0" / split, 10) as writer:
            if split == "train":
                writer.add([1, 2, 3])
    report = {"data_format": "documents", "sources": [{"name": "x", "weight": 1.0}]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert open_dataset(tmp_path, "documents", "train", 2, 0).size == 2
    with pytest.raises(UserError, match="validation"):
        open_dataset(tmp_path, "documents", "validation", 2, 0)


def test_T9_a_folder_without_a_report_is_a_one_line_error(tmp_path):
    with pytest.raises(UserError, match=r"report\.json: .*tinsmith prepare"):
        open_dataset(tmp_path, "documents", "train", 8, 0)

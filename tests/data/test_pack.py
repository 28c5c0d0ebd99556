import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinsmith.data.loader.pack import ChatRows, DocumentRows
from tinsmith.data.prepare.shards import Shards, ShardWriter

seq_lens = st.integers(1, 40)
lengths_strategy = st.lists(st.integers(1, 60), min_size=1, max_size=20)
quick = settings(
    derandomize=True,
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def distinct_documents(lengths):
    """Every token occurs once in the whole stream, so that its place is known."""
    edges = np.cumsum([0, *lengths])
    return [np.arange(a, b) for a, b in itertools.pairwise(edges)]


def write(folder, documents, masks=None):
    with ShardWriter(folder, 2000, masked=masks is not None, shard_tokens=17) as writer:
        for index, ids in enumerate(documents):
            writer.add(ids, None if masks is None else masks[index])
    return Shards.open(folder)


def naive_layout(row):
    """Positions and segments as the definition says, one position after the other."""
    positions, previous = [], None
    for segment in row.segments.tolist():
        positions.append(0 if segment == -1 or segment != previous else positions[-1] + 1)
        previous = segment
    return positions


@given(lengths_strategy, seq_lens)
@quick
def test_an_epoch_of_documents_contains_every_token_once(tmp_path_factory, lengths, seq_len):
    documents = distinct_documents(lengths)
    rows = DocumentRows(write(tmp_path_factory.mktemp("d"), documents), seq_len)
    epoch = [rows.get_row(index) for index in range(rows.size)]
    ids = np.concatenate([row.ids[row.segments >= 0] for row in epoch])
    assert np.array_equal(ids, np.concatenate(documents))
    assert rows.num_tokens == len(ids)


@given(lengths_strategy, seq_lens)
@quick
def test_targets_are_the_next_token_of_the_same_document(tmp_path_factory, lengths, seq_len):
    documents = distinct_documents(lengths)
    rows = DocumentRows(write(tmp_path_factory.mktemp("d"), documents), seq_len)
    last_tokens = {int(ids[-1]) for ids in documents}
    num_trained = 0
    for index in range(rows.size):
        row = rows.get_row(index)
        for token, target, trained, segment in zip(
            row.ids, row.targets, row.mask, row.segments, strict=True
        ):
            assert trained == (segment >= 0 and int(token) not in last_tokens)
            assert target == (token + 1 if trained else 0)
            num_trained += trained
    assert num_trained == sum(lengths) - len(lengths)  # all but the first token of each document


@given(lengths_strategy, seq_lens)
@quick
def test_segments_and_positions_of_documents(tmp_path_factory, lengths, seq_len):
    documents = distinct_documents(lengths)
    rows = DocumentRows(write(tmp_path_factory.mktemp("d"), documents), seq_len)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for index in range(rows.size):
        row = rows.get_row(index)
        used = row.segments >= 0
        assert row.positions.tolist() == naive_layout(row)
        row_documents = document_of[row.ids[used]]
        assert np.array_equal(row.segments[used], row_documents - row_documents[0])
        assert used.all() or index == rows.size - 1
        assert not row.mask[~used].any()


def chats(lengths, seed):
    """Chats of which every second or so token is trained, at least one target each."""
    rng = np.random.default_rng(seed)
    masks = [rng.random(n) < 0.5 for n in lengths]
    for mask in masks:
        mask[-1] = True
    return distinct_documents(lengths), masks


chat_lengths = st.lists(st.integers(2, 60), min_size=1, max_size=20)


@given(chat_lengths, seq_lens, st.integers(0, 99))
@quick
def test_every_trained_token_of_every_chat_is_a_target_exactly_once(
    tmp_path_factory, lengths, seq_len, seed
):
    documents, masks = chats(lengths, seed)
    rows = ChatRows(write(tmp_path_factory.mktemp("c"), documents, masks), seq_len)
    epoch = [rows.get_row(index) for index in range(rows.size)]
    targets = np.concatenate([row.targets[row.mask] for row in epoch])
    expected = np.concatenate(
        [ids[1:][mask[1:]] for ids, mask in zip(documents, masks, strict=True)]
    )
    assert np.array_equal(np.sort(targets), expected)
    ids = np.concatenate([row.ids[row.segments >= 0] for row in epoch])
    assert len(np.unique(ids)) == len(ids) == rows.num_tokens
    if not rows.num_skipped_pieces:
        assert np.array_equal(np.sort(ids), np.concatenate(documents))


@given(chat_lengths, seq_lens, st.integers(0, 99))
@quick
def test_segments_and_positions_of_chats(tmp_path_factory, lengths, seq_len, seed):
    documents, masks = chats(lengths, seed)
    trained = {
        int(i) for ids, mask in zip(documents, masks, strict=True) for i in ids[1:][mask[1:]]
    }
    rows = ChatRows(write(tmp_path_factory.mktemp("c"), documents, masks), seq_len)
    for index in range(rows.size):
        row = rows.get_row(index)
        assert len(row.ids) == seq_len
        assert row.positions.tolist() == naive_layout(row)
        for segment in range(row.segments.max() + 1):
            ids = row.ids[row.segments == segment]
            assert (np.diff(ids) == 1).all()  # one chat, in order
        for token, target, is_trained, segment in zip(
            row.ids, row.targets, row.mask, row.segments, strict=True
        ):
            assert target == (token + 1 if is_trained else 0)
            assert not is_trained or (segment >= 0 and int(target) in trained)


def test_a_long_chat_is_split_and_pieces_without_trained_tokens_are_skipped(make_shards):
    ids = np.arange(25)
    mask = ids >= 21  # a long question, a short answer
    rows = ChatRows(make_shards([ids], [mask]), 10)
    assert (rows.num_split_chats, rows.num_skipped_pieces, rows.size, rows.num_tokens) == (
        1,
        2,
        1,
        5,
    )
    row = rows.get_row(0)
    assert row.ids.tolist() == [20, 21, 22, 23, 24] + [0] * 5
    assert row.segments.tolist() == [0] * 5 + [-1] * 5
    assert row.targets[row.mask].tolist() == [21, 22, 23, 24]


def test_a_chat_that_fits_starts_its_row_at_position_zero(make_shards):
    rows = ChatRows(make_shards([np.arange(6), np.arange(6, 10)], [np.ones(6), np.ones(4)]), 10)
    row = rows.get_row(0)
    assert row.ids.tolist() == list(range(10))
    assert row.segments.tolist() == [0] * 6 + [1] * 4
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert row.mask.tolist() == [True] * 5 + [False] + [True] * 3 + [False]


@pytest.mark.parametrize("seq_len", [256, 1024])
def test_packed_documents_use_99_percent_of_positions(make_shards, random_documents, seq_len):
    rows = DocumentRows(make_shards(random_documents(1, 500, 600), shard_tokens=10_000), seq_len)
    assert rows.num_tokens / (rows.size * seq_len) >= 0.99


def test_an_empty_source_has_no_rows(make_shards):
    assert DocumentRows(make_shards([]), 8).size == 0
    assert ChatRows(make_shards([], [], name="chats"), 8).size == 0

"""KV caches: where tokens are stored, what queries see, truncation, selection and joining
of rows.
"""

import pytest
import torch

from tinsmith.nn.attention.cache import KVCache, RotatingKVCache
from tinsmith.nn.contract import CacheFull, CannotTruncate, truncate_caches
from tinsmith.nn.model import LM, ModelConfig

CPU = torch.device("cpu")


def append(rows=2, capacity=8):
    return KVCache(rows, capacity, [(1,)], torch.float64, CPU)


def ring(rows=2, capacity=20, window=3):
    return RotatingKVCache(rows, capacity, window, [(1,)], torch.float64, CPU)


def feed(cache, tokens, segments=None):
    """Take in rows of numbers; return for every query the list of numbers that it sees, sorted."""
    new = torch.tensor(tokens, dtype=torch.float64)[..., None]
    if segments is not None:
        segments = torch.tensor(segments)
    (held,), seen = cache.append(segments, new)
    visible = seen.mask(new.shape[1], held.shape[1], CPU).expand(len(new), -1, -1)
    return [
        [sorted(held[b, visible[b, t], 0].tolist()) for t in range(new.shape[1])]
        for b in range(len(new))
    ]


@pytest.mark.parametrize("make", [append, ring])
def test_tokens_are_seen_in_order(make):
    cache = make()
    assert feed(cache, [[1, 2], [5, 6]]) == [[[1], [1, 2]], [[5], [5, 6]]]
    assert feed(cache, [[3], [7]]) == [[[1, 2, 3]], [[5, 6, 7]]]
    assert cache.lengths.tolist() == [3, 3]


def test_a_rotating_cache_sees_the_last_tokens_of_its_window():
    cache = ring(window=3)
    assert feed(cache, [[1, 2, 3, 4, 5]] * 2)[0] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [2, 3, 4],
        [3, 4, 5],
    ]
    assert feed(cache, [[6]] * 2)[0] == [[4, 5, 6]]
    assert feed(cache, [[7, 8]] * 2)[0] == [[5, 6, 7], [6, 7, 8]]
    assert feed(cache, [[9]] * 2, [[-1], [0]])[1] == [[7, 8, 9]]
    assert cache.lengths.tolist() == [8, 9]
    assert feed(cache, [[9], [10]]) == [[[7, 8, 9]], [[8, 9, 10]]]


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_a_rotating_cache_writes_no_slot_twice_in_a_call(monkeypatch, count):
    """The order of two writes to one slot is undefined."""
    written = []

    def write(self, slot_BT, keep_BT, new):
        keep_BT = torch.ones_like(slot_BT, dtype=torch.bool) if keep_BT is None else keep_BT
        written.extend(slot_BT[b, keep_BT[b]].tolist() for b in range(len(slot_BT)))

    monkeypatch.setattr(RotatingKVCache, "write", write)
    cache = ring(window=3)
    for _ in range(2):
        feed(cache, [[1.0] * count] * 2, [[0] * count, [-1] + [0] * (count - 1)])
    assert written
    assert all(len(slots) == len(set(slots)) for slots in written)


@pytest.mark.parametrize("segments", [None, [[0] * 9, [-1, -1, *[0] * 7]]])
def test_a_rotating_cache_returns_several_tokens_in_order_of_position(segments):
    """Every query then sees an interval of keys, at most a window: no mask is needed."""
    cache = ring(window=3)
    feed(cache, [[1, 2], [5, 6]], [[0, 0], [0, -1]])
    reported = None if segments is None else torch.tensor(segments)
    _, seen = cache.append(reported, torch.zeros(2, 9, 1, dtype=torch.float64))
    assert seen.key_positions_BS is None
    real = torch.ones(2, 9, dtype=torch.bool) if reported is None else reported >= 0
    assert (seen.high_BT - seen.low_BT)[real].max() == 2
    assert (seen.low_BT[real] >= 0).all()


@pytest.mark.parametrize("make", [append, ring])
def test_padding_is_neither_stored_nor_seen(make):
    cache = make()
    seen = feed(cache, [[0, 0, 1], [7, 8, 0]], [[-1, -1, 0], [0, 0, -1]])
    assert (seen[0][2], seen[1][:2]) == ([1], [[7], [7, 8]])
    assert cache.lengths.tolist() == [1, 2]
    assert feed(cache, [[2], [9]]) == [[[1, 2]], [[7, 8, 9]]]


@pytest.mark.parametrize("make", [append, ring])
def test_a_document_ends_where_the_id_changes_and_goes_on_otherwise(make):
    cache = make(rows=1)
    assert feed(cache, [[1, 2]], [[7, 3]]) == [[[1], [2]]]
    assert feed(cache, [[3]], [[3]]) == [[[2, 3]]]
    assert feed(cache, [[4]]) == [[[2, 3, 4]]]
    assert feed(cache, [[5]], [[7]]) == [[[5]]]


@pytest.mark.parametrize("make", [append, ring])
def test_more_than_the_capacity_is_refused_and_nothing_changes(make):
    cache = make(capacity=6)
    feed(cache, [[1, 2, 3, 4]] * 2)
    for segments in (None, [[-1] * 3, [0] * 3]):
        with pytest.raises(CacheFull, match="7 tokens, a cache with room for 6"):
            feed(cache, [[5, 6, 7]] * 2, segments)
        assert cache.lengths.tolist() == [4, 4]
    assert feed(cache, [[5, 6]] * 2)[0][-1] in ([1, 2, 3, 4, 5, 6], [4, 5, 6])


def test_truncate_removes_the_requested_tokens():
    cache = append()
    feed(cache, [[1, 2, 3, 4], [5, 6, 7, 8]])
    cache.truncate(torch.tensor([1, 3]))
    assert feed(cache, [[2], [9]]) == [[[1, 2]], [[5, 6, 7, 9]]]
    cache.truncate(torch.tensor([0, 0]))
    assert feed(cache, [[1], [2]]) == [[[1]], [[2]]]


def test_a_rotating_cache_truncates_until_it_has_dropped_tokens():
    cache = ring(window=3)
    feed(cache, [[1, 2, 3], [5, 6, 7]])
    cache.truncate(torch.tensor([1, 3]))
    feed(cache, [[2], [8]])
    assert cache.lengths.tolist() == [2, 4]
    cache.truncate(torch.tensor([1, 4]))
    with pytest.raises(CannotTruncate, match="window of 3"):
        cache.truncate(torch.tensor([1, 3]))
    assert cache.lengths.tolist() == [1, 4]
    assert feed(cache, [[2], [9]]) == [[[1, 2]], [[7, 8, 9]]]


@pytest.mark.parametrize("make", [append, lambda: ring(window=6)])
def test_a_finished_document_cannot_be_restored(make):
    """Where it began is forgotten, so losing all of the current document is refused; also exactly
    at the border.
    """
    cache = make()
    feed(cache, [[1, 2, 3, 4]] * 2, [[0, 0, 1, 1]] * 2)
    for lengths in ([1, 4], [4, 2]):
        with pytest.raises(CannotTruncate, match="current document"):
            cache.truncate(torch.tensor(lengths))
    cache.truncate(torch.tensor([3, 4]))
    assert feed(cache, [[9, 9]] * 2) == [[[3, 9], [3, 9, 9]], [[3, 4, 9], [3, 4, 9, 9]]]


def test_truncating_to_the_current_length_is_always_possible():
    cache = ring(window=3)
    feed(cache, [[1, 2, 3, 4, 5]] * 2, [[0, 0, 1, 1, 1]] * 2)
    cache.truncate(torch.tensor([5, 5]))
    assert feed(cache, [[6]] * 2)[0] == [[4, 5, 6]]


@pytest.mark.parametrize("make", [append, ring])
def test_selected_rows_are_independent(make):
    cache = make()
    feed(cache, [[1, 2], [5, 6]])
    cache.select(torch.tensor([1, 1, 0]))
    assert feed(cache, [[7], [8], [3]]) == [[[5, 6, 7]], [[5, 6, 8]], [[1, 2, 3]]]
    cache.select(torch.tensor([1]))
    assert feed(cache, [[9]])[0][0][-2:] == [8, 9]


@pytest.mark.parametrize("capacities", [(2, 20), (20, 2), (3, 20), (2, 2), (1, 2)])
@pytest.mark.parametrize("make", [append, ring])
def test_joined_rows_keep_their_content(make, capacities):
    mine, theirs = (make(rows=1, capacity=capacity) for capacity in capacities)
    long, short = ([1, 2, 3, 4], [1]) if capacities == (20, 2) else ([1], [1, 2])
    feed(mine, [long])
    feed(theirs, [short])
    mine.join(theirs)
    assert mine.lengths.tolist() == [len(long), len(short)]
    room = max(capacities) - max(len(long), len(short))
    for number in range(room):
        seen = feed(mine, [[50 + number]] * 2)
        for row, start in enumerate((long, short)):
            history = [*start, *range(50, 51 + number)]
            assert seen[row][0] == (history if make is append else history[-3:])
    with pytest.raises(CacheFull):
        feed(mine, [[99]] * 2)


def test_bytes_are_counted():
    shapes = [(2, 8), (2, 8)]
    assert KVCache(3, 10, shapes, torch.bfloat16, CPU).nbytes() == 3 * 10 * 32 * 2
    assert RotatingKVCache(3, 10, 4, shapes, torch.float32, CPU).nbytes() == 3 * 4 * 32 * 4
    assert RotatingKVCache(3, 10, 64, shapes, torch.float32, CPU).nbytes() == 3 * 10 * 32 * 4


def test_E6_the_caches_of_a_model_are_truncated_together_or_not_at_all():
    """A window forgets what a full layer keeps."""
    gqa = {"kind": "gqa", "heads": 4, "kv_heads": 2}
    swiglu = {"kind": "swiglu", "hidden_dim": 24}
    pattern = [{"mixer": gqa, "feed_forward": swiglu}]
    pattern.append({"mixer": gqa | {"window": 5}, "feed_forward": swiglu})
    section = {"vocab_size": 48, "dim": 32, "depth": 2, "max_seq_len": 64, "pattern": pattern}
    torch.manual_seed(0)
    lm = LM(ModelConfig.from_dict(section)).double().eval()
    ids = torch.randint(48, (1, 20))
    caches = lm.new_caches(1, 40)
    lm(ids[:, :18], caches=caches)
    with pytest.raises(CannotTruncate):
        truncate_caches(caches, torch.tensor([9]))
    assert [cache.lengths.tolist() for cache in caches] == [[18], [18]]
    found = lm(ids[:, 18:], caches=caches).logits
    torch.testing.assert_close(found, lm(ids).logits[:, 18:], rtol=0, atol=1e-10)
    short = lm.new_caches(1, 40)
    lm(ids[:, :4], caches=short)
    truncate_caches(short, torch.tensor([2]))
    found = lm(ids[:, 2:5], caches=short).logits
    torch.testing.assert_close(found, lm(ids[:, :5]).logits[:, 2:], rtol=0, atol=1e-10)

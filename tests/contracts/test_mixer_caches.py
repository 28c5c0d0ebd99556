"""Decoding with every mixer's cache, and every residual, equals the full forward pass."""

import random
from contextlib import nullcontext

import pytest
import torch

from tests.contracts.checks import close, decode, pad_rows
from tinsmith.nn.contract import CacheFull, CannotTruncate

SIZES = [1, 3, 4, 5, 6, 97, *(pytest.param(size, marks=pytest.mark.slow) for size in (33, 256))]
"""One token, sizes around a block (4) and a window (5), and long rows."""
LENGTHS = [1, 5, 9, 12]
NEXT_LENGTHS = [2, 0, 7, 4]
"""Tokens of each of four rows in the second call."""


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def lengths_of(caches):
    lengths = [cache.lengths.tolist() for cache in caches]
    assert all(other == lengths[0] for other in lengths)
    return lengths[0]


def splits_of(size):
    """Return ways to divide `size` tokens into calls."""
    return [
        [1] * size,
        [size],
        [7] * (size // 7) + [1] * (size % 7),
        [3, 1, 6, 1, 1, 5] * (size // 17) + [size % 17],
        [size - 1, 1],
    ]


@pytest.mark.parametrize("size", SIZES)
def test_prefill_equals_chunks_equals_one_by_one(lm, draw, size):
    ids = draw(2, size)
    expected = lm(ids).logits
    for lengths in splits_of(size):
        close(decode(lm, ids, lengths), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_different_length_decode_as_if_alone(lm, draw, side):
    """Padded prefill, a padded chunk of other lengths, then single tokens while some rows wait."""
    ids = draw(4, 24)
    full_logits = lm(ids).logits
    caches = lm.new_caches(batch_size=4, capacity=24)
    done = [0] * 4
    rounds = [
        LENGTHS,
        NEXT_LENGTHS,
        [1, 0, 1, 0],
        [1, 1, 1, 1],
        [0, 0, 0, 0],
        [0, 1, 1, 1],
        [3, 2, 0, 3],
    ]
    for added in rounds:
        pieces = [ids[row, done[row] : done[row] + count] for row, count in enumerate(added)]
        padded_ids, segments = pad_rows(pieces, max(*added, 1) + (side == "left"), side)
        found = lm(padded_ids, segments=segments, caches=caches).logits
        assert found.isfinite().all()
        for row, count in enumerate(added):
            close(found[row][segments[row] >= 0], full_logits[row, done[row] : done[row] + count])
            done[row] += count
        assert lengths_of(caches) == done


def test_decoding_continues_without_segments(lm, draw):
    ids = draw(4, 12)
    padded_ids, segments = pad_rows(
        [ids[row, :length] for row, length in enumerate(LENGTHS)], 12, "left"
    )
    caches = lm.new_caches(batch_size=4, capacity=20)
    lm(padded_ids, segments=segments, caches=caches)
    more = draw(4, 6, seed=4)
    found = torch.cat(
        [lm(more[:, begin:end], caches=caches).logits for begin, end in ((0, 1), (1, 4), (4, 6))], 1
    )
    for row, length in enumerate(LENGTHS):
        whole = torch.cat((ids[row, :length], more[row]))[None]
        close(found[row], lm(whole).logits[0, length:])


def test_documents_continue_over_several_calls(lm, draw):
    """Packed rows with explicit positions, in chunks that divide documents."""
    segments = torch.tensor([[7] * 4 + [3] + [7] * 8 + [0] * 5, [5] * 9 + [2] * 2 + [4] * 7])
    positions = torch.tensor(
        [[*range(4), 0, *range(8), *range(5)], [*range(9), *range(2), *range(7)]]
    )
    ids = draw(2, 18)
    expected = lm(ids, segments=segments).logits
    for splits in ([18], [1] * 18, [3, 1, 1, 7, 6], [10, 8]):
        caches = lm.new_caches(batch_size=2, capacity=18)
        begin, found = 0, []
        for length in splits:
            part = slice(begin, begin + length)
            found.append(
                lm(ids[:, part], positions[:, part], segments[:, part], caches=caches).logits
            )
            begin += length
        close(torch.cat(found, 1), expected)


def test_rows_are_selected_reordered_and_repeated(lm, draw):
    ids, more = draw(4, 12), draw(4, 12, seed=7)
    histories = [ids[row, :length] for row, length in enumerate(LENGTHS)]
    padded_ids, segments = pad_rows(histories, 12, "left")
    caches = lm.new_caches(batch_size=4, capacity=20)
    lm(padded_ids, segments=segments, caches=caches)
    for step, order in enumerate(([3, 0, 0, 2], [1, 3], [1], [0, 0, 0])):
        for cache in caches:
            cache.select(torch.tensor(order))
        fresh = more[: len(order), step : step + 2]
        histories = [torch.cat((histories[i], new)) for i, new in zip(order, fresh, strict=True)]
        assert lengths_of(caches) == [len(history) - 2 for history in histories]
        found = lm(fresh, caches=caches).logits
        for row, history in enumerate(histories):
            close(found[row], lm(history[None]).logits[0, -2:])


def test_an_emptied_cache_accepts_new_rows(lm, draw):
    ids = draw(2, 9)
    caches, fresh = lm.new_caches(2, 16), lm.new_caches(2, 16)
    lm(draw(2, 7, seed=3), caches=caches)
    lm(ids[:, :8], caches=fresh)
    for cache, other in zip(caches, fresh, strict=True):
        cache.select(torch.tensor([], dtype=torch.long))
        assert cache.lengths.tolist() == []
        cache.join(other)
    close(lm(ids[:, 8:], caches=caches).logits, lm(ids).logits[:, 8:])


@pytest.mark.parametrize("kept", [[4, 4], [1, 3], [0, 0], [0, 4]])
def test_a_truncated_cache_equals_one_that_never_had_the_tokens(lm, is_truncatable, draw, kept):
    """With at most as many tokens as a window (5), so that every cache of keys can be truncated. A
    recurrent state raises and keeps all tokens.
    """
    ids, other = draw(2, 4), draw(2, 9, seed=3)
    caches = lm.new_caches(batch_size=2, capacity=20)
    lm(ids, caches=caches)
    can_truncate = is_truncatable or kept == [4, 4]
    for cache in caches:
        with nullcontext() if can_truncate else pytest.raises(CannotTruncate, match="its start"):
            cache.truncate(torch.tensor(kept))
    kept = kept if can_truncate else [4, 4]
    assert lengths_of(caches) == kept
    found = lm(other, caches=caches).logits
    for row, length in enumerate(kept):
        whole = torch.cat((ids[row, :length], other[row]))[None]
        close(found[row], lm(whole).logits[0, length:])


def test_truncating_far_works_or_raises_and_changes_nothing(lm, draw):
    ids, other = draw(2, 20), draw(2, 4, seed=3)
    caches = lm.new_caches(batch_size=2, capacity=40)
    lm(ids, caches=caches)
    refused, messages = [], []
    for cache in caches:
        try:
            cache.truncate(torch.tensor([11, 20]))
        except CannotTruncate as error:
            refused.append(cache)
            messages.append(str(error))
    assert refused in ([], caches)
    assert all("again from its start" in line and "\n" not in line for line in messages)
    kept = 20 if refused else 11
    assert lengths_of(caches) == [kept, 20]
    found = lm(other, caches=caches).logits
    close(found[:1], lm(torch.cat((ids[:1, :kept], other[:1]), 1)).logits[:, kept:])
    close(found[1:], lm(torch.cat((ids[1:], other[1:]), 1)).logits[:, 20:])


def test_truncating_to_a_longer_or_negative_length_raises(lm, draw):
    caches = lm.new_caches(batch_size=2, capacity=8)
    lm(draw(2, 3), caches=caches)
    for lengths in ([4, 3], [3, -1]):
        with pytest.raises(ValueError, match="cannot truncate"):
            caches[0].truncate(torch.tensor(lengths))
    assert lengths_of(caches) == [3, 3]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((12, 30), (9, 30)),
        ((12, 30), (3, 4)),
        ((3, 4), (12, 30)),
        ((4, 4), (2, 3)),
        ((2, 3), (1, 4)),
        ((0, 30), (9, 9)),
    ],
)
def test_caches_of_different_capacity_join(lm, draw, first, second):
    """`first`, `second`: (tokens, capacity), below and above a window (5). The joined cache has
    the larger capacity.
    """
    ids = draw(2, 13)
    both = []
    for row, (length, capacity) in enumerate((first, second)):
        caches = lm.new_caches(batch_size=1, capacity=capacity)
        if length:
            lm(ids[row : row + 1, :length], caches=caches)
        both.append(caches)
    for cache, other in zip(*both, strict=True):
        cache.join(other)
    assert lengths_of(both[0]) == [first[0], second[0]]
    room = max(first[1], second[1]) - max(first[0], second[0])
    more = draw(2, min(room, 10), seed=4)
    for t in range(more.shape[1]):
        found = lm(more[:, t : t + 1], caches=both[0]).logits[:, 0]
        for row, length in enumerate((first[0], second[0])):
            whole = torch.cat((ids[row, :length], more[row, : t + 1]))[None]
            close(found[row], lm(whole).logits[0, -1])
    if room <= 10:
        with pytest.raises(CacheFull):
            lm(draw(2, 1), caches=both[0])


@pytest.mark.parametrize("padded", [False, True])
def test_a_full_cache_raises_and_changes_nothing(lm, draw, padded):
    ids = draw(2, 12)
    caches = lm.new_caches(batch_size=2, capacity=12)
    if padded:
        lm(*_padded_start(ids), caches=caches)
        lengths = [4, 7]
    else:
        lm(ids[:, :7], caches=caches)
        lengths = [7, 7]
    with pytest.raises(CacheFull, match=r"a row of 13 tokens, a cache with room for 12: make it"):
        lm(draw(2, 6, seed=3), caches=caches)
    segments = torch.tensor([[-1] * 6, [0] * 6])
    with pytest.raises(CacheFull):
        lm(draw(2, 6, seed=3), segments=segments, caches=caches)
    assert lengths_of(caches) == lengths
    more = draw(2, 5, seed=4)
    found = lm(more, caches=caches).logits
    for row, length in enumerate(lengths):
        whole = torch.cat((ids[row, :length], more[row]))[None]
        close(found[row], lm(whole).logits[0, length:])


def _padded_start(ids):
    padded_ids, segments = pad_rows([ids[0, :4], ids[1, :7]], 9, "left")
    return padded_ids, None, segments


def test_calls_without_tokens_or_rows_change_nothing(lm, draw):
    ids = draw(2, 5)
    caches = lm.new_caches(2, 8)
    for segments in (None, torch.zeros(2, 0, dtype=torch.long)):
        assert lm(ids[:, :0], segments=segments, caches=caches).logits.shape == (2, 0, 48)
    assert lm(ids[:0], caches=lm.new_caches(0, 8)).logits.shape == (0, 5, 48)
    close(lm(ids, caches=caches).logits, lm(ids).logits)


def test_padding_takes_no_capacity(lm, draw):
    """Rows of 12 positions with at most 5 tokens fit where 5 tokens fit."""
    ids = draw(2, 5)
    padded_ids, segments = pad_rows([ids[0], ids[1, :2]], 12, "right")
    caches = lm.new_caches(batch_size=2, capacity=5)
    found = lm(padded_ids, segments=segments, caches=caches).logits
    close(found[0, :5], lm(ids[:1]).logits[0])
    assert lengths_of(caches) == [5, 2]


def test_two_sets_of_caches_on_one_model_are_independent(lm, draw):
    ids = draw(2, 12)
    expected = lm(ids).logits
    caches = [lm.new_caches(batch_size=1, capacity=12) for _ in range(2)]
    for begin, end in ((0, 4), (4, 5), (5, 6), (6, 12)):
        for row in range(2):
            found = lm(ids[row : row + 1, begin:end], caches=caches[row]).logits
            close(found, expected[row : row + 1, begin:end])


@pytest.mark.parametrize("capacity", [3, 5, 64])
def test_the_cache_has_the_size_of_its_formula(lm, expected_cache_size, draw, capacity):
    for rows, dtype, size in ((1, None, 8), (4, torch.float32, 4), (4, torch.bfloat16, 2)):
        caches = lm.new_caches(rows, capacity, dtype)
        for cache, layer in zip(caches, lm.config.layers, strict=True):
            assert cache.nbytes() == rows * expected_cache_size(layer.mixer, capacity) * size
        lm(draw(rows, 3), caches=caches)
        for cache, layer in zip(caches, lm.config.layers, strict=True):
            assert cache.nbytes() == rows * expected_cache_size(layer.mixer, capacity) * size
            cache.select(torch.zeros(3, dtype=torch.long))
            assert cache.nbytes() == 3 * expected_cache_size(layer.mixer, capacity) * size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_caches_of_lower_precision_decode(lm, selective_kinds, mixer, draw, dtype):
    """If rounding may change a selection, the bound holds for the better half of the tokens."""
    ids = draw(2, 12)
    caches = lm.new_caches(2, 12, dtype)
    padded_ids, segments = pad_rows([ids[0, :7], ids[1, :7]], 9, "left")
    lm(padded_ids, segments=segments, caches=caches)
    found = torch.cat(
        [lm(ids[:, begin:end], caches=caches).logits for begin, end in ((7, 8), (8, 12))], 1
    )
    expected = lm(ids).logits[:, 7:]
    each = (found - expected).square().mean(-1).flatten()
    if mixer["kind"] in selective_kinds:
        each = each.sort().values[: len(each) // 2]
    error = each.mean().sqrt() / expected.square().mean().sqrt()
    assert found.dtype == torch.float64
    assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("seed", range(4))
def test_any_history_of_a_batch_equals_the_full_forward(lm, draw, seed):
    """Padded chunks, new documents, truncation, reordering and joined rows, in random order. The
    logits of each token equal those of one forward pass over the row's history.
    """
    rng = random.Random(seed)
    capacity = 40
    caches = lm.new_caches(batch_size=2, capacity=capacity)
    rows: list[list[tuple[int, int]]] = [[], []]  # (id, document) of every token of every row
    for _ in range(14):
        move = rng.choice(["append", "append", "append", "append", "truncate", "select", "join"])
        if move == "append":
            rows = _append(lm, caches, rows, rng, capacity)
        elif move == "truncate":
            rows = _truncate(caches, rows, rng)
        elif move == "select":
            order = [rng.randrange(len(rows)) for _ in range(rng.randint(1, 3))]
            for cache in caches:
                cache.select(torch.tensor(order))
            rows = [list(rows[i]) for i in order]
        else:
            arrivals = lm.new_caches(batch_size=1, capacity=rng.choice([6, 30]))
            rows += _append(lm, arrivals, [[]], rng, 6)
            for cache, arrival in zip(caches, arrivals, strict=True):
                cache.join(arrival)
        assert lengths_of(caches) == [len(row) for row in rows]


def _append(lm, caches, rows, rng, capacity):
    width = rng.choice([1, 1, 2, 6, 11])
    ids = torch.full((len(rows), width), 3)
    segments = torch.full((len(rows), width), -1)
    longer = []
    for b, row in enumerate(rows):
        count = rng.choice([rng.randint(0, width), width])
        count = min(count, capacity - len(row))
        begin = rng.choice([0, width - count])
        fresh = []
        document = row[-1][1] if row else 0
        for t in range(begin, begin + count):
            if rng.random() < 0.15:
                document = rng.choice([name for name in range(4) if name != document])
            fresh.append((rng.randrange(48), document))
            ids[b, t], segments[b, t] = fresh[-1]
        longer.append(row + fresh)
    passed = None if _continues(segments, rows) and rng.random() < 0.7 else segments
    found = lm(ids, segments=passed, caches=caches).logits
    assert found.isfinite().all()
    for b, row in enumerate(longer):
        if row:
            history, documents = torch.tensor(row).T[:, None]
            positions = torch.arange(len(row))[None]
            whole = lm(history, positions, documents).logits[0]
            close(found[b][segments[b] >= 0], whole[len(rows[b]) :])
    return longer


def _continues(segments, rows):
    """Return True without padding and new documents, which is what `segments=None` means."""
    last = torch.tensor([row[-1][1] if row else 0 for row in rows])
    return bool((segments == last[:, None]).all())


def _truncate(caches, rows, rng):
    kept = [rng.randint(max(len(row) - 4, 0), len(row)) for row in rows]
    try:
        for cache in caches:
            cache.truncate(torch.tensor(kept))
    except CannotTruncate:
        assert lengths_of(caches) == [len(row) for row in rows]
        return rows
    return [row[:length] for row, length in zip(rows, kept, strict=True)]

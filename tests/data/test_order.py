import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.core.rng import derive_seed
from tinsmith.data.loader.order import ROUNDS, order, order_many, permute, permute_many

WORD = 2**64 - 1


def slow_mix(word):
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & WORD
    return word ^ (word >> 31)


def slow_permute(index, size, seed, *keys):
    """The same Feistel network in plain integers."""
    half = max(2, ((size - 1).bit_length() + 1) // 2)
    mask = 2**half - 1
    round_keys = [
        slow_mix((derive_seed(seed, *keys) + number) & WORD) for number in range(1, ROUNDS + 1)
    ]
    while True:
        left, right = index >> half, index & mask
        for key in round_keys:
            left, right = right, left ^ (slow_mix(right ^ key) & mask)
        index = (left << half) | right
        if index < size:
            return index


@given(st.integers(1, 3000), st.integers(0, 2**62), st.integers(0, 5))
@settings(derandomize=True, max_examples=100, deadline=None)
def test_a_permutation_is_a_bijection(size, seed, epoch):
    permuted = permute_many(np.arange(size), size, seed, epoch)
    assert np.array_equal(np.sort(permuted), np.arange(size))


@given(st.integers(1, 10**12), st.integers(0, 2**62), st.data())
@settings(derandomize=True, max_examples=100, deadline=None)
def test_permute_equals_permute_many_and_a_plain_python_oracle(size, seed, data):
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
    many = permute_many(np.array(indices), size, seed, "k", 3)
    assert many.tolist() == [permute(index, size, seed, "k", 3) for index in indices]
    assert many.tolist() == [slow_permute(index, size, seed, "k", 3) for index in indices]


def test_every_index_is_equally_likely():
    size, draws = 60, 6000
    counts = np.zeros((size, size))
    for seed in range(draws):
        counts[np.arange(size), permute_many(np.arange(size), size, seed)] += 1
    expected = draws / size
    chi_square = ((counts - expected) ** 2 / expected).sum(axis=1)
    assert abs(chi_square.mean() - (size - 1)) < 3
    assert chi_square.max() < 115  # 59 degrees of freedom: 1e-5


def test_adjacent_samples_do_not_stay_adjacent():
    permuted = permute_many(np.arange(10_000), 10_000, 7)
    steps = np.abs(np.diff(permuted))
    assert (steps == 1).mean() < 0.002
    assert abs(steps.mean() - 10_000 / 3) < 100


def test_seeds_and_epochs_give_unrelated_orders():
    orders = [permute_many(np.arange(1000), 1000, seed, e) for seed in range(3) for e in range(3)]
    agreeing = [(a == b).mean() for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreeing) < 0.01


def test_an_order_can_start_at_any_index_in_constant_time():
    size = 2**55
    assert 0 <= permute(size - 1, size, 1) < size
    assert order(5, 7 * size + 123, size)[0] == 7


def test_every_epoch_contains_every_sample_once_in_a_new_order():
    size = 100
    passes = order_many(3, np.arange(3 * size), size, "source", 0).reshape(3, size)
    for epoch, permuted in enumerate(passes):
        assert np.array_equal(np.sort(permuted), np.arange(size))
        assert [order(3, epoch * size + i, size, "source", 0) for i in range(4)] == [
            (epoch, int(sample_index)) for sample_index in permuted[:4]
        ]
    assert not np.array_equal(passes[0], passes[1])


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_out_of_range_raises(index):
    with pytest.raises(IndexError):
        permute(index, 10, 0)

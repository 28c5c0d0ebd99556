import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.data.loader.binpack import best_fit


def covered(packing):
    """Every token that some piece covers, sorted."""
    ranges = [np.arange(a, a + n) for a, n in zip(packing.starts, packing.lengths, strict=True)]
    return np.sort(np.concatenate(ranges)) if ranges else np.zeros(0)


@given(st.integers(1, 200), st.data())
@settings(derandomize=True, max_examples=200, deadline=None)
def test_every_token_is_in_exactly_one_row_and_no_row_exceeds_its_capacity(capacity, data):
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=60)), dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    packing = best_fit(starts, lengths, capacity)
    assert np.array_equal(covered(packing), np.arange(lengths.sum()))
    sums = (
        np.add.reduceat(packing.lengths, packing.row_offsets[:-1]) if len(lengths) else np.zeros(0)
    )
    assert (sums <= capacity).all()
    assert (np.diff(packing.row_offsets) > 0).all()
    assert packing.row_offsets[-1] == len(packing.starts)


def usage(lengths, packing, capacity):
    return lengths.sum() / (len(packing.row_offsets) - 1) / capacity


@pytest.mark.parametrize("capacity", [128, 256, 512, 2048, 8192])
def test_packing_efficiency_is_99_percent_for_usual_length_distributions(capacity):
    rng = np.random.default_rng(capacity)
    distributions = {
        "log-normal": np.minimum(rng.lognormal(4, 1, 20_000).astype(int) + 5, capacity),
        "uniform": rng.integers(1, capacity + 1, 20_000),
    }
    for name, lengths in distributions.items():
        packing = best_fit(np.cumsum(lengths) - lengths, lengths, capacity)
        assert usage(lengths, packing, capacity) >= 0.99, name


@given(st.integers(1, 200), st.data())
@settings(derandomize=True, max_examples=200, deadline=None)
def test_T3_a_piece_that_fits_into_a_row_is_never_cut(capacity, data):
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=60)), dtype=np.int64)
    packing = best_fit(np.cumsum(lengths) - lengths, lengths, capacity)
    assert sorted(packing.lengths.tolist()) == sorted(lengths.tolist())


def test_pieces_that_fill_a_row_exactly_are_packed_together():
    packing = best_fit(np.array([0, 100, 200, 300]), np.array([70, 20, 10, 25]), 100)
    rows = [
        packing.lengths[a:b].tolist()
        for a, b in zip(packing.row_offsets, packing.row_offsets[1:], strict=False)
    ]
    assert rows == [[70, 20, 10], [25]]


def test_packing_is_deterministic():
    lengths = np.random.default_rng(1).integers(1, 300, 5000)
    starts = np.cumsum(lengths) - lengths
    first, second = best_fit(starts, lengths, 300), best_fit(starts, lengths, 300)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))

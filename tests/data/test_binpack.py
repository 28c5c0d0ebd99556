import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.data.loader.binpack import ALLOWED_WASTE, best_fit


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
def test_packing_efficiency_is_99_percent_for_all_length_distributions(capacity):
    rng = np.random.default_rng(capacity)
    distributions = {
        "log-normal": np.minimum(rng.lognormal(5, 1, 20_000).astype(int) + 5, capacity),
        "uniform": rng.integers(capacity // 20, capacity + 1, 20_000),
        "just over half": np.full(20_000, capacity // 2 + 1),
        "no small ones": rng.integers(capacity // 3, capacity // 2, 20_000),
    }
    for name, lengths in distributions.items():
        packing = best_fit(np.cumsum(lengths) - lengths, lengths, capacity)
        assert usage(lengths, packing, capacity) >= 0.99, name


def test_chats_that_pack_well_are_not_cut():
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1, 20_000).astype(int) + 5, 1024)
    packing = best_fit(np.cumsum(lengths) - lengths, lengths, 1024)
    assert len(packing.starts) == len(lengths)


def test_a_cut_takes_the_end_of_the_longest_piece():
    lengths = np.array([60, 60, 60])
    packing = best_fit(np.array([0, 60, 120]), lengths, 100)
    assert ALLOWED_WASTE < 0.4
    assert (packing.starts[:2].tolist(), packing.lengths[:2].tolist()) == ([0, 80], [60, 40])


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

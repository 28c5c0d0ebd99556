"""The recurrent cache against a loop over single tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinsmith.nn.contract import CacheFull, CannotTruncate
from tinsmith.nn.recurrent import RecurrentCache, recurrent_steps

CPU = torch.device("cpu")
CAPACITY = 30


def cache_of(rows, capacity=CAPACITY, dtype=torch.float64):
    return RecurrentCache(rows, capacity, [(), (2, 3)], dtype, CPU)


def run(tokens, steps, states):
    """Return h_t = 3 h_{t-1} + x_t for all tokens of float64 (B, T), and the last states."""
    tensors = []
    for state in states:
        update = tokens.reshape(*tokens.shape, *[1] * (state.dim() - 1))
        update = update.expand(*tokens.shape, *state.shape[1:])
        decay, update = steps.mask(torch.full_like(tokens, 3), update)
        outputs = []
        for t in range(tokens.shape[1]):
            state = decay[:, t].reshape(-1, *[1] * (state.dim() - 1)) * state + update[:, t]
            outputs.append(state)
        tensors.append((outputs, state))
    return tensors


def feed(cache, tokens, segments=None):
    """Append a call of tokens (B, T); return h_t (B, T), which is equal in all entries."""
    tokens = torch.tensor(tokens, dtype=torch.float64)
    segments = None if segments is None else torch.tensor(segments)
    states, steps = cache.append(segments, tokens.shape[1])
    (scalars, scalar), (matrices, matrix) = run(tokens, steps, [s.double() for s in states])
    cache.store(scalar, matrix)
    for left, right in zip(scalars, matrices, strict=True):
        assert torch.equal(left[:, None, None].expand_as(right), right)
    return torch.stack(scalars, 1).tolist() if scalars else [[]] * len(tokens)


def history(tokens):
    """Return h after each (token, document): one row, one token at a time."""
    states, state, document = [], 0.0, None
    for token, its_document in tokens:
        state = token + (3 * state if its_document == document else 0)
        document = its_document
        states.append(state)
    return states


@st.composite
def calls(draw):
    """Calls of two rows: for each row a list of (token, document), document -1 for padding."""
    token = st.tuples(st.integers(1, 9), st.sampled_from([-1, 0, 0, 0, 5]))
    widths = draw(st.lists(st.integers(0, 4), max_size=5))
    return [[draw(st.lists(token, min_size=n, max_size=n)) for _ in range(2)] for n in widths]


@given(calls())
def test_any_calls_equal_single_tokens(batch):
    cache, rows, found = cache_of(2), [[], []], [[], []]
    for call in batch:
        tokens, documents = ([[pair[i] for pair in row] for row in call] for i in (0, 1))
        output = feed(cache, tokens, documents)
        for row in range(2):
            real = [pair for pair in call[row] if pair[1] >= 0]
            rows[row] += real
            found[row] += [
                h for h, pair in zip(output[row], call[row], strict=True) if pair[1] >= 0
            ]
        assert cache.lengths.tolist() == [len(row) for row in rows]
    assert found == [history(row) for row in rows]


@given(st.lists(st.sampled_from([-1, 0, 0, 1, 2]), max_size=9))
def test_a_call_without_a_cache_equals_one_with_a_new_cache(segments):
    """Padding inside a document ends it without a cache, as in attention spans."""
    body = [s for i, s in enumerate(segments) if s >= 0 or set(segments[i:]) == {-1}]
    padded = torch.tensor([[-1, *body]])
    _, steps = cache_of(1).append(padded, padded.shape[1])
    expected = recurrent_steps(padded)
    assert torch.equal(steps.starts_BT, expected.starts_BT)
    assert torch.equal(steps.valid_BT, expected.valid_BT)


def test_without_segments_the_document_continues():
    cache = cache_of(2)
    feed(cache, [[1, 2], [1, 2]], [[0, 4], [4, -1]])
    assert feed(cache, [[1], [1]]) == [[7], [4]]
    assert feed(cache, [[1], [1]], [[4], [0]]) == [[22], [1]]


def test_padding_after_the_first_token_of_a_document_keeps_the_state():
    cache = cache_of(1)
    assert feed(cache, [[5, 9, 9]], [[0, -1, -1]]) == [[5, 5, 5]]
    assert feed(cache, [[9]], [[-1]]) == [[5]]
    assert feed(cache, [[1]]) == [[16]]


def test_it_forgets_no_token():
    cache = cache_of(2)
    feed(cache, [[1, 2, 3]] * 2)
    cache.truncate(torch.tensor([3, 3]))
    for lengths in ([2, 3], [3, 0]):
        with pytest.raises(CannotTruncate, match="again from its start"):
            cache.truncate(torch.tensor(lengths))
    with pytest.raises(ValueError, match="cannot truncate"):
        cache.truncate(torch.tensor([3, 4]))
    assert feed(cache, [[0]] * 2) == [[54]] * 2


def test_rows_are_selected_and_joined():
    cache, other = cache_of(2, capacity=4), cache_of(1, capacity=6)
    feed(cache, [[1, 2], [3, 4]])
    feed(other, [[7, 0, 0]])
    cache.select(torch.tensor([1, 1, 0]))
    cache.join(other)
    assert cache.lengths.tolist() == [2, 2, 2, 3]
    assert feed(cache, [[0]] * 4) == [[39], [39], [15], [189]]
    assert feed(cache, [[0]] * 4, [[0], [0], [0], [1]])[3] == [0]
    with pytest.raises(CacheFull, match="7 tokens, a cache with room for 6"):
        feed(cache, [[0, 0]] * 4)
    assert cache.lengths.tolist() == [4, 4, 4, 5]


def test_its_size_does_not_depend_on_the_capacity():
    for capacity in (1, 1000):
        assert cache_of(3, capacity, torch.bfloat16).nbytes() == 3 * 7 * 2
    cache = cache_of(1, dtype=torch.float32)
    feed(cache, [[1, 2]])
    assert all(state.dtype == torch.float32 for state in cache.states)

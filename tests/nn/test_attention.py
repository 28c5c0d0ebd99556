"""attend against attention written out in loops, and against transformers' formulas."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.oracles.attention import attention, seen_by
from tests.oracles.close import close_to
from tinsmith.nn.attention import core as attending
from tinsmith.nn.attention.core import attend
from tinsmith.nn.attention.span import Span, attention_span, document_starts

close = close_to(1e-12)

KINDS = ["sdpa", "naive"]


def drawn(queries, keys, heads=4, groups=2, width=8, rows=2, dtype=torch.float64):
    source = torch.Generator().manual_seed(1)
    shapes = ((rows, queries, heads, width), *[(rows, keys, groups, width)] * 2)
    return tuple(torch.randn(shape, generator=source, dtype=dtype) for shape in shapes)


def one_document(rows, length):
    return torch.zeros(rows, length, dtype=torch.long)


SEGMENTS = [
    torch.tensor([[0] * 11, [0] * 11]),
    torch.tensor([[7] * 4 + [3] + [7] * 6, [-1] * 3 + [0] * 8]),
    torch.tensor([[0] * 5 + [1] * 4 + [-1] * 2, [-1] * 11]),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("window", [None, 1, 2, 5, 10, 11, 12])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_equals_the_definition(kind, segments, window, sinks):
    q, k, v = drawn(11, 11)
    z = torch.tensor([-1.0, 0.0, 0.5, 3.0], dtype=torch.float64) if sinks else None
    seen = attention_span(segments, 11, window, q.device)
    close(attend(q, k, v, seen, kind=kind, sinks_H=z), attention(q, k, v, segments, window, z))


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("window", [None, 2, 5])
@pytest.mark.parametrize("room", [1, 2 * 2 * 11 * 4, attending.MASK_BYTES])
def test_torch_kernels_equal_the_definition_for_any_split_of_queries(
    monkeypatch, segments, window, room
):
    """As on a GPU, with a dense mask for a limited number of pairs at a time."""
    monkeypatch.setattr(attending, "_use_blockwise", lambda *_: False)
    monkeypatch.setattr(attending, "MASK_BYTES", room)
    written, visible = [], Span.mask

    def counted(*requested):
        written.append(visible(*requested))
        return written[-1]

    monkeypatch.setattr(Span, "mask", counted)
    q, k, v = drawn(11, 11)
    seen = attention_span(segments, 11, window, q.device)
    expected = attention(q, k, v, segments, window)
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    found = attend(*inputs, seen)
    close(found, expected)
    one_query = 2 * 2 * 11
    assert all(2 * mask.numel() <= max(room, one_query) for mask in written)
    if room < attending.MASK_BYTES:
        assert sum(mask.numel() for mask in written) < 2 * 11 * 11, "later keys are left out"
    naive = attend(*inputs, seen, kind="naive")
    weights = torch.randn(found.shape, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), inputs) for y in (found, naive))
    for one, other in zip(ours, theirs, strict=True):
        close(one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seen", [Span(), attention_span(None, 0, None, torch.device("cpu"))])
def test_no_queries_give_an_empty_output(kind, seen):
    q, k, v = drawn(0, 5)
    assert attend(q, k, v, seen, kind=kind).shape == q.shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 3])
def test_attention_without_segments_equals_one_document(kind, window):
    q, k, v = drawn(9, 9)
    seen = attention_span(None, 9, window, q.device)
    expected = attention(q, k, v, one_document(2, 9), window)
    close(attend(q, k, v, seen, kind=kind), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (4, 2), (4, 1), (6, 3), (8, 2)])
def test_query_heads_share_key_heads_in_order(kind, heads, groups):
    q, k, v = drawn(7, 7, heads, groups)
    found = attend(q, k, v, Span(), kind=kind)
    close(found, attention(q, k, v, one_document(2, 7)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (2, 9), (8, 9), (3, 3)])
def test_A5_a_chunk_of_queries_sees_the_whole_past(kind, sinks, queries, keys):
    """With a cache there are more keys than queries: a mask aligned at the top left would let the
    first query see one key only.
    """
    q, k, v = drawn(queries, keys)
    z = torch.tensor([-1.0, 0.0, 0.5, 3.0], dtype=torch.float64) if sinks else None
    found = attend(q, k, v, Span(), kind=kind, sinks_H=z)
    close(found, attention(q, k, v, one_document(2, keys), sinks=z))


@pytest.mark.parametrize("kind", KINDS)
def test_free_cache_slots_are_not_visible(kind):
    """Keys in any order, some free slots among them, as a ring holds them."""
    q, k, v = drawn(1, 6)
    places = torch.tensor([[4, 5, 2, 3, -1, -1], [3, -1, 1, 2, 0, -1]])
    high, low = torch.tensor([[5], [3]]), torch.tensor([[3], [0]])
    k[places < 0], v[places < 0] = 1e4, 1e4
    found = attend(q, k, v, Span(low, high, places), kind=kind)
    for row, order in enumerate(([3, 0, 1], [4, 2, 3, 0])):
        part = slice(row, row + 1)
        expected = attention(q[part], k[part, order], v[part, order], one_document(1, len(order)))
        close(found[part], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_sinks_equal_those_of_gpt_oss(kind):
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    q, k, v = drawn(9, 9)
    z = torch.tensor([-1.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    for window in (None, 4):
        seen = attention_span(None, 9, window, q.device)
        mask = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
        mask.masked_fill_(~seen.mask(9, 9, q.device)[:, None], -math.inf)
        theirs, _ = eager_attention_forward(
            SimpleNamespace(num_key_value_groups=2, sinks=z, training=False),
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            mask,
            scaling=8**-0.5,
        )
        close(attend(q, k, v, seen, kind=kind, sinks_H=z), theirs)


def test_a_sink_weakens_plain_attention_by_a_sigmoid():
    """out * sigmoid(logsumexp - z), possible with any kernel that returns its logsumexp."""
    q, k, v = drawn(9, 9, groups=4)
    z = torch.tensor([-1.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    scores = torch.einsum("bthd,bshd->bths", q, k) / math.sqrt(8)
    scores = scores.masked_fill(~torch.ones(9, 9).tril().bool()[None, :, None], -math.inf)
    share = torch.sigmoid(scores.logsumexp(-1) - z)[..., None]
    close(attend(q, k, v, Span(), sinks_H=z), attend(q, k, v, Span()) * share)


def test_a_very_negative_sink_has_no_effect():
    q, k, v = drawn(9, 9)
    z = torch.full((4,), -1e3, dtype=torch.float64)
    close(attend(q, k, v, Span(), sinks_H=z), attend(q, k, v, Span()))


@pytest.mark.parametrize("window", [1, 2, 5, 8, 9, 20])
def test_the_window_equals_that_of_mistral(window):
    """The last `window` tokens, the query's own among them."""
    from transformers.masking_utils import sliding_window_causal_mask_function

    theirs = sliding_window_causal_mask_function(window)
    seen = attention_span(None, 9, window, torch.device("cpu")).mask(9, 9, torch.device("cpu"))[0]
    index = torch.arange(9)
    assert torch.equal(seen, theirs(index[:1], index[:1], index[:, None], index))
    assert seen.sum(1).tolist() == [min(window, t + 1) for t in range(9)]


def test_a_window_as_wide_as_the_row_is_full_attention():
    here, segments = torch.device("cpu"), SEGMENTS[1][:, :9]
    for window in (9, 10):
        assert attention_span(None, 9, window, here).is_causal
        wide, full = (attention_span(segments, 9, size, here) for size in (window, None))
        assert torch.equal(wide.mask(9, 9, here), full.mask(9, 9, here))


@pytest.mark.parametrize("segments", SEGMENTS)
def test_documents_start_where_the_id_changes(segments):
    starts = document_starts(segments)
    for row, ids in zip(starts.tolist(), segments.tolist(), strict=True):
        assert row == [min(seen_by(t, ids, None)) for t in range(len(ids))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("segments", SEGMENTS)
def test_gradients_equal_those_of_the_definition(kind, segments):
    z = torch.tensor([-1.0, 0.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    inputs = [tensor.requires_grad_() for tensor in drawn(5, 5)]
    seen = attention_span(segments[:, :5], 5, 3, torch.device("cpu"))
    weight = torch.randn(2, 5, 4, 8, generator=torch.Generator().manual_seed(2))

    def total(*values):
        return (attend(*values[:3], seen, kind=kind, sinks_H=values[3]) * weight).sum()

    found = torch.autograd.grad(total(*inputs, z), [*inputs, z])
    for value, gradient in zip([*inputs, z], found, strict=True):
        flat, step = value.detach().flatten(), 1e-5
        for index in range(0, len(flat), 17):
            moved = []
            for sign in (1, -1):
                other = flat.clone()
                other[index] += sign * step
                args = [other.view_as(x) if x is value else x.detach() for x in (*inputs, z)]
                definition = attention(*args[:3], segments[:, :5], 3, args[3])
                moved.append((definition * weight).sum())
            slope = (moved[0] - moved[1]) / (2 * step)
            assert gradient.flatten()[index] == pytest.approx(slope.item(), abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sinks", [False, True])
def test_dropout_acts_on_the_weights_and_keeps_the_mean(kind, sinks):
    q, k, v = (tensor[:1] for tensor in drawn(6, 6, heads=2))
    z = torch.zeros(2, dtype=torch.float64) if sinks else None
    many = [tensor.expand(4000, -1, -1, -1) for tensor in (q, k, v)]
    torch.manual_seed(0)
    found = attend(*many, Span(), kind=kind, dropout=0.25, sinks_H=z)
    expected = attend(q, k, v, Span(), kind=kind, sinks_H=z)
    assert found.std(0).max() > 0.1
    assert ((found.mean(0) - expected[0]).abs() < 6 * found.std(0) / 4000**0.5 + 1e-9).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_stays_and_large_logits_stay_finite(kind, dtype):
    q, k, v = drawn(9, 9, dtype=dtype)
    segments = SEGMENTS[2][:, :9]
    for sinks in (None, torch.zeros(4, dtype=dtype)):
        seen = attention_span(segments, 9, None, q.device)
        found = attend(30 * q, 30 * k, v, seen, kind=kind, sinks_H=sinks)
        assert found.dtype == dtype
        assert found.isfinite().all()

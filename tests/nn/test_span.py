"""Documents of packed batches, and the spans and boundaries that all layers share."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles.close import close_to
from tinsmith.nn import contract
from tinsmith.nn.attention import span as module
from tinsmith.nn.attention.core import attend
from tinsmith.nn.attention.rope import apply_rotary_emb
from tinsmith.nn.attention.span import (
    Span,
    attention_span,
    attention_spans,
    document_starts,
    pack_documents,
)
from tinsmith.nn.contract import Ctx, Out
from tinsmith.nn.mixers.gqa import GQAMixer

CPU = torch.device("cpu")
close = close_to(1e-12)


@st.composite
def batches(draw):
    """Segments (B, T) of packed rows with padding anywhere; ids may come twice in a row."""
    rows, length = draw(st.integers(0, 4)), draw(st.integers(0, 12))
    ids = st.lists(st.integers(-1, 2), min_size=length, max_size=length)
    return torch.tensor(
        draw(st.lists(ids, min_size=rows, max_size=rows)), dtype=torch.long
    ).reshape(rows, length)


def documents_of(segments):
    """Return the indices of each document's tokens in the flattened batch, by walking the rows."""
    documents = []
    for b, row in enumerate(segments.tolist()):
        previous = None
        for t, document in enumerate(row):
            if document >= 0:
                if document != previous:
                    documents.append([])
                documents[-1].append(b * len(row) + t)
            previous = document
    return documents


@given(batches())
def test_cu_seqlens_are_the_cumulative_lengths_of_the_documents(segments):
    expected = documents_of(segments)
    packed = pack_documents(segments, *segments.shape, CPU)
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens[0] == 0
    pairs = pairwise(packed.cu_seqlens)
    assert [packed.indices_N[begin:end].tolist() for begin, end in pairs] == expected
    assert packed.max_seqlen == max(map(len, expected), default=0)


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (2, 0), (0, 4)])
def test_without_segments_each_row_is_a_document(shape):
    found = pack_documents(None, *shape, CPU)
    rows, length = shape
    assert found.indices_N.tolist() == list(range(rows * length))
    assert found.cu_seqlens.tolist() == [length * row for row in range(rows + 1)]
    assert found.cu_seqlens.dtype == torch.int32
    assert found.max_seqlen == (length if rows else 0)


@given(batches(), st.sampled_from([None, 1, 2, 3, 20]))
def test_a_span_begins_at_the_document_or_the_window(segments, window):
    rows, length = segments.shape
    starts = document_starts(segments)
    mask = attention_span(segments, length, window, CPU).mask(length, length, CPU)
    for b in range(rows):
        for t in range(length):
            low = max(int(starts[b, t]), 0 if window is None else t - window + 1)
            row = mask.expand(rows, -1, -1)[b, t]
            assert row.nonzero()[:, 0].tolist() == list(range(low, t + 1))


def test_documents_are_found_once_for_all_windows(monkeypatch):
    calls = _counted(monkeypatch, module, "document_starts")
    segments = torch.tensor([[0, 0, 1, 1, -1]])
    spans = attention_spans(segments, 5, (None, 1, 2, 9), CPU)
    assert len(calls) == 1
    for window, span in spans.items():
        expected = attention_span(segments, 5, window, CPU)
        assert all(torch.equal(*pair) for pair in zip(span.bounds, expected.bounds, strict=True))


def test_a_ctx_of_positions_and_segments_is_enough():
    segments = torch.tensor([[0, 0, 1, 1, -1], [3, 3, 3, 3, 3]])
    ctx = Ctx(torch.arange(5).expand(2, 5), segments)
    for window in (None, 2):
        expected = attention_span(segments, 5, window, CPU)
        for left, right in zip(ctx.span(window).bounds, expected.bounds, strict=True):
            assert torch.equal(left, right)
    assert ctx.packed_documents().cu_seqlens.tolist() == [0, 2, 4, 9]
    assert Ctx(ctx.positions).span() == Span()


def _counted(monkeypatch, owner, name):
    calls, function = [], getattr(owner, name)

    def counted(*args):
        calls.append(args)
        return function(*args)

    monkeypatch.setattr(owner, name, counted)
    return calls


class VarlenMixer(GQAMixer):
    """Grouped-query attention to each document alone, as a kernel with `cu_seqlens` computes it."""

    needs_cu_seqlens = True

    def forward(self, x, ctx, cache=None):
        packed = ctx.packed_documents()
        projections = ((self.q_proj, self.heads), (self.k_proj, 2), (self.v_proj, 2))
        q, k, v = (layer(x).unflatten(-1, (heads, -1)) for layer, heads in projections)
        q, k = (apply_rotary_emb(tensor, ctx.rotary[self.rotary_dim]) for tensor in (q, k))
        q, k, v = (tensor.flatten(0, 1)[packed.indices_N] for tensor in (q, k, v))
        bounds = packed.cu_seqlens.tolist()
        documents = [slice(*pair) for pair in pairwise(bounds)]
        y = torch.cat([attend(q[None, d], k[None, d], v[None, d], Span())[0] for d in documents])
        padded = x.new_zeros(x.shape[0] * x.shape[1], y[0].numel())
        padded[packed.indices_N] = y.flatten(1)
        return Out(self.o_proj(padded.view(*x.shape[:2], -1)))


@torch.no_grad()
def test_attention_with_cu_seqlens_equals_spans(small, ids, monkeypatch):
    """The boundaries are computed once per forward pass, and only if a mixer needs them."""
    calls = _counted(monkeypatch, contract, "pack_documents")
    lm = small()
    batch = [None, torch.tensor([[-1] * 2 + [4] * 5 + [0] + [4] * 4, [1] * 9 + [-1] * 3])]
    expected = [lm(ids, segments=segments).logits for segments in batch]
    assert not calls
    for block in lm.blocks:
        block.mixer.__class__ = VarlenMixer
    for segments, logits in zip(batch, expected, strict=True):
        found = lm(ids, segments=segments).logits
        real = slice(None) if segments is None else segments >= 0
        close(found[real], logits[real])
    assert len(calls) == 2

"""Compressed blocks: which exist, where they end, which tokens see them, in any chunks."""

import pytest
import torch

from tinsmith.nn.attention.compress import (
    BlockCache,
    BlockLayout,
    attend_compressed,
    block_positions,
)
from tinsmith.nn.attention.span import attention_span
from tinsmith.nn.contract import CacheFull, CannotTruncate

CPU = torch.device("cpu")
CUTS = [
    BlockLayout(4, 2),
    BlockLayout(4, 4),
    BlockLayout(6, 2),
    BlockLayout(1, 1),
    BlockLayout(3, 1),
]
DOCUMENTS = [
    [0] * 17,
    [0] * 3,
    [7, 7, 7, 3, 7, 7, 7, 7, 7, 2, 2, 2, 2, 2, 2, 2, 5],
    [-1, -1, 4, 4, 4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0, -1, -1],
    [1] * 5 + [2] * 5 + [1] * 7,
    list(range(17)),
]


def expected(segments, cut):
    """For every token the blocks it sees, as lists of places; by walking through the documents."""
    seen, start = [], 0
    for t, name in enumerate(segments):
        if t and segments[t - 1] != name:
            start = t
        firsts = range(start, t + 1, cut.stride)
        seen.append([list(range(f, f + cut.size)) for f in firsts if f + cut.size - 1 <= t])
    return seen


def reported(cut, at, blocks_NL, row=0):
    """The same, from slots."""
    first, count = (
        x.expand(at.cache_position_BT.shape[0], -1)[row].tolist() for x in cut.visible_blocks(at)
    )
    return [blocks_NL[f : f + n] for f, n in zip(first, count, strict=True)]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("segments", DOCUMENTS)
def test_every_token_sees_the_complete_blocks_of_its_document(cut, segments):
    length = len(segments)
    seen = attention_span(torch.tensor([segments]), length, None, CPU)
    places = torch.arange(length)[None, :, None]
    blocks_NL = cut.gather_blocks(places, seen)[0, ..., 0].tolist()
    assert len(blocks_NL) == cut.num_slots(length)
    assert reported(cut, block_positions(seen, length, length, CPU), blocks_NL) == expected(
        segments, cut
    )


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 6, 17])
def test_one_document_is_a_view_without_an_index_table(cut, length):
    """The view for plain rows equals the index table for packed rows, block i in slot i."""
    seen = attention_span(None, length, None, CPU)
    x = torch.randn(2, length, 3, 2)
    blocks = cut.gather_blocks(x, seen)
    table = cut.gather_blocks(
        x, attention_span(torch.zeros(2, length, dtype=torch.long), length, None, CPU)
    )
    assert torch.equal(blocks, table)
    for i in range(cut.num_slots(length)):
        assert torch.equal(blocks[:, i], x[:, i * cut.stride : i * cut.stride + cut.size])
    at = block_positions(seen, length, length, CPU)
    assert [len(list_) for list_ in reported(cut, at, list(range(99)))] == [
        len(list_) for list_ in expected([0] * length, cut)
    ]


@pytest.mark.parametrize("cut", CUTS)
def test_blocks_never_share_a_slot_for_any_document_boundaries(cut):
    source = torch.Generator().manual_seed(0)
    for _ in range(50):
        segments = (torch.rand(1, 40, generator=source) < 0.15).cumsum(1)
        at = block_positions(attention_span(segments, 40, None, CPU), 40, 40, CPU)
        slots = cut.slot_index(at.cache_position_BT[cut.block_ends(at)]).tolist()
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < cut.num_slots(40) for slot in slots)


@pytest.mark.parametrize("cut", CUTS)
def test_gradients_of_the_index_table_equal_those_of_the_view(cut):
    """A token in two blocks gets both their gradients."""
    gradients = []
    for segments in (None, torch.zeros(1, 17, dtype=torch.long)):
        x = torch.randn(1, 17, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
        blocks = cut.gather_blocks(x, attention_span(segments, 17, None, CPU))
        weights = torch.randn(blocks.shape, generator=torch.Generator().manual_seed(1))
        gradients.append(torch.autograd.grad((blocks * weights).sum(), x)[0])
    torch.testing.assert_close(*gradients)


class Fed:
    """A cache of sums of blocks of numbers, and the sums that the tokens of one row see."""

    def __init__(self, cut, rows=1, capacity=40):
        self.cut = cut
        self.cache = BlockCache(cut, rows, capacity, [(1,)], [(1,)], torch.float64, CPU)
        self.lengths = torch.zeros(rows, dtype=torch.long)

    def take(self, numbers, segments, starts):
        """-> per row and real token the sums that it sees."""
        segments = torch.tensor(segments)
        real = segments >= 0
        place = (self.lengths[:, None] + real.cumsum(1) - 1).where(real, -1)
        at = block_positions(attention_span(None, 1, None, CPU), 1, 1, CPU)._replace(
            cache_position_BT=place, start_BT=torch.tensor(starts).where(real, 0)
        )
        new = torch.tensor(numbers, dtype=torch.float64)[..., None]
        ended = self.cache.append(segments, at, new)
        (sums,) = self.cache.append_blocks(ended, ended.tokens[0].sum(1))
        self.lengths += real.sum(1)
        return [
            [
                reported(self.cut, at, sums[b, :, 0].tolist(), b)[t]
                for t in range(len(real[b]))
                if real[b, t]
            ]
            for b in range(len(real))
        ]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("split", [1, 2, 3, 5, 17])
@pytest.mark.parametrize("segments", DOCUMENTS)
def test_a_cache_sees_the_same_blocks_in_any_chunks(cut, split, segments):
    """Padding takes no place; a document goes on from call to call."""
    line = [name for name in segments if name >= 0]
    starts, start = [], 0
    for t, name in enumerate(line):
        start = t if t and line[t - 1] != name else start
        starts.append(start)
    fed, found, done = Fed(cut), [], 0
    for begin in range(0, len(segments), split):
        part = segments[begin : begin + split]
        count = sum(name >= 0 for name in part)
        fresh = iter(range(done, done + count))
        taken = [next(fresh) if name >= 0 else 99 for name in part]
        spread = [starts[p] if p != 99 else 0 for p in taken]
        found += fed.take([[2.0**p for p in taken]], [part], [spread])[0]
        done += count
    sums = [[sum(2.0**p for p in block) for block in seen] for seen in expected(line, cut)]
    assert found == sums


def test_a_cache_selects_joins_and_truncates():
    cut = BlockLayout(4, 2)
    fed, other = Fed(cut, rows=2), Fed(cut, rows=1, capacity=6)
    fed.take([[1, 2, 3, 4], [5, 6, 7, 8]], [[0] * 4] * 2, [[0] * 4] * 2)
    fed.cache.truncate(torch.tensor([4, 3]))
    fed.lengths = torch.tensor([4, 3])
    other.take([[1, 1, 1, 1, 1]], [[0] * 5], [[0] * 5])
    fed.cache.join(other.cache)
    fed.cache.select(torch.tensor([2, 0, 1]))
    fed.lengths = torch.tensor([5, 4, 3])
    seen = fed.take([[1, 9], [1, 9], [1, 9]], [[0, 0]] * 3, [[0, 0]] * 3)
    assert seen == [[[4, 4], [4, 4]], [[10], [10, 17]], [[19], [19]]]
    with pytest.raises(CannotTruncate):
        fed.cache.truncate(torch.tensor([3, 6, 5]))
    fed.cache.truncate(torch.tensor([6, 6, 4]))
    fed.lengths = torch.tensor([6, 6, 4])
    assert fed.take([[2]] * 3, [[0]] * 3, [[0]] * 3) == [[[4, 4]], [[10, 17]], [[19]]]
    assert fed.take([[0]] * 3, [[0]] * 3, [[0]] * 3) == [[[4, 4, 4]], [[10, 17, 12]], [[19, 10]]]
    assert fed.cache.nbytes() == 3 * 8 * (4 + cut.num_slots(40))


def test_a_full_cache_raises_and_changes_nothing():
    fed = Fed(BlockLayout(2, 2), capacity=3)
    fed.take([[1, 2]], [[0, 0]], [[0, 0]])
    with pytest.raises(CacheFull):
        fed.take([[3, 4]], [[0, 0]], [[0, 0]])
    assert fed.take([[5]], [[0]], [[0]]) == [[[3]]]


@pytest.mark.parametrize("kind", ["sdpa", "naive"])
def test_a_query_without_visible_blocks_gets_zero(kind):
    cut, length = BlockLayout(4, 2), 9
    q = torch.randn(2, length, 4, 8, requires_grad=True)
    k, v = (torch.randn(2, cut.num_slots(length), 2, 8, requires_grad=True) for _ in range(2))
    at = block_positions(attention_span(None, length, None, CPU), length, length, CPU)
    y = attend_compressed(q, k, v, cut, at, kind=kind)
    assert (y[:, :3] == 0).all()
    assert torch.allclose(y[:, 3], v[:, 0].repeat_interleave(2, 1))
    y.sum().backward()
    assert (q.grad[:, :3] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    none = attend_compressed(q[:, :3], k[:, :0], v[:, :0], cut, at, kind=kind)
    assert none.shape == (2, 3, 4, 8)
    assert (none == 0).all()
    none.sum().backward()

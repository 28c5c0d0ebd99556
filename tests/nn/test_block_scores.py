"""Selection of blocks: the paper's sum of scores, forced blocks, ties, documents."""

import math

import pytest
import torch

from tests.oracles.nsa import chosen_blocks
from tinsmith.nn.attention import block_scores
from tinsmith.nn.attention.block_scores import select_blocks
from tinsmith.nn.attention.compress import BlockLayout, block_positions
from tinsmith.nn.attention.span import attention_span

CPU = torch.device("cpu")


def choose(q, k, cut, segments=None, *, size, count):
    """(B, G, T) lists of the numbers of chosen blocks, ascending; of documents, not places."""
    length = q.shape[1]
    at = block_positions(attention_span(segments, length, None, CPU), length, length, CPU)
    begins = select_blocks(q, k, cut, at, keys=length, size=size, count=count)
    start = at.start_BT.expand(len(q), -1)
    return [
        [
            [
                sorted((int(begin) - int(start[b, t])) // size for begin in line if begin >= 0)
                for t, line in enumerate(begins[b, g])
            ]
            for g in range(k.shape[2])
        ]
        for b in range(len(q))
    ]


def drawn(length, cut, rows=2, heads=4, groups=2, scale=2.0):
    source = torch.Generator().manual_seed(length)
    q = scale * torch.randn(rows, length, heads, 8, generator=source, dtype=torch.float64)
    k = torch.randn(rows, cut.num_slots(length), groups, 8, generator=source, dtype=torch.float64)
    return q, k


@pytest.mark.parametrize(
    ("cut", "size", "count"),
    [
        (BlockLayout(4, 2), 8, 4),
        (BlockLayout(4, 2), 4, 5),
        (BlockLayout(4, 4), 4, 4),
        (BlockLayout(6, 2), 6, 4),
        (BlockLayout(1, 1), 3, 4),
        (BlockLayout(4, 2), 4, 1),
        (BlockLayout(4, 2), 4, 2),
    ],
)
@pytest.mark.parametrize("chunk", [7, 128])
def test_selected_blocks_equal_those_of_the_paper(cut, size, count, chunk, monkeypatch):
    monkeypatch.setattr(block_scores, "QUERY_CHUNK", chunk)
    q, k = drawn(45, cut)
    found = choose(q, k, cut, size=size, count=count)
    for b in range(2):
        for g in range(2):
            for t in range(45):
                own = q[b, t, 2 * g : 2 * g + 2]
                expected = chosen_blocks(t, own, list(k[b, :, g]), *cut, size, count)
                assert found[b][g][t] == expected


def test_own_first_and_previous_blocks_are_always_selected():
    cut = BlockLayout(4, 2)
    for count, forced in ((1, (0,)), (2, (0, 0)), (3, (0, 0, 1)), (5, (0, 0, 1))):
        found = choose(*drawn(60, cut), cut, size=8, count=count)
        for t, line in enumerate(found[0][0]):
            own = t // 8
            wanted = {own, *([0] if len(forced) > 1 else []), *([own - 1] if count > 2 else [])}
            assert {j for j in wanted if j >= 0} <= set(line)
            assert len(line) == min(count, own + 1)


def test_equal_scores_select_the_first_blocks():
    """Ties by index: constant keys, whatever the last bits of their weights."""
    cut = BlockLayout(4, 4)
    q, k = drawn(64, cut)
    found = choose(q, k[:, :1].expand_as(k), cut, size=4, count=5)
    for t, line in enumerate(found[0][1]):
        own = t // 4
        # all blocks of raw tokens before the own one hold one compressed block each
        assert line == sorted({0, 1, 2, own - 1, own} & set(range(own + 1))) or own < 4
        assert line == sorted(line)
    assert found[0][1][-1] == [0, 1, 2, 14, 15]


@pytest.mark.parametrize("length", [4, 9, 20, 37])
def test_a_longer_row_selects_the_same_blocks(length):
    cut = BlockLayout(4, 2)
    q, k = drawn(60, cut)
    whole = choose(q, k, cut, size=4, count=4)
    part = choose(q[:, :length], k[:, : cut.num_slots(length)], cut, size=4, count=4)
    assert part[1][1] == whole[1][1][:length]


def test_documents_select_independently():
    """Their blocks are counted from their first token, and only their own are weighed."""
    cut, length = BlockLayout(4, 2), 46
    segments = torch.tensor([[-1] * 3 + [5] * 20 + [2] * 21 + [-1] * 2])
    q = drawn(length, cut, rows=1)[0]
    raw = torch.randn(1, length, 2, 8, dtype=torch.float64)
    packed = cut.gather_blocks(raw, attention_span(segments, length, None, CPU)).sum(2)
    found = choose(q, packed, cut, segments, size=4, count=4)
    for part in (slice(3, 23), slice(23, 44)):
        alone = cut.gather_blocks(raw[:, part], attention_span(None, 99, None, CPU)).sum(2)
        expected = choose(q[:, part], alone, cut, size=4, count=4)
        assert [line[part] for line in found[0]] == expected[0]


def test_padding_selects_no_blocks():
    cut = BlockLayout(4, 2)
    q, k = drawn(20, cut)
    at = block_positions(attention_span(None, 20, None, CPU), 20, 20, CPU)
    place = at.cache_position_BT.expand(2, -1).clone()
    place[1, 5:] = -1
    padded = at._replace(cache_position_BT=place)
    begins = select_blocks(q, k, cut, padded, keys=20, size=4, count=3)
    assert (begins[1, :, 5:] == -1).all()
    assert (begins[0] >= 0).any(-1).all()
    unselected = at._replace(cache_position_BT=torch.full((2, 20), -1))
    assert (select_blocks(q, k, cut, unselected, keys=20, size=4, count=3) == -1).all()


def test_selection_has_no_gradient_and_is_shared_by_heads_of_a_group():
    cut = BlockLayout(4, 2)
    q, k = (x.requires_grad_() for x in drawn(20, cut))
    at = block_positions(attention_span(None, 20, None, CPU), 20, 20, CPU)
    begins = select_blocks(q, k, cut, at, keys=20, size=4, count=3)
    assert begins.shape == (2, 2, 20, 3)
    assert not begins.requires_grad


def test_attention_weights_are_never_stored_completely(monkeypatch):
    """(queries x blocks) only for a chunk of queries, and only up to the blocks they see."""
    shapes, cut = [], BlockLayout(4, 2)
    weigh = block_scores._importance
    monkeypatch.setattr(
        block_scores,
        "_importance",
        lambda mass, *rest: shapes.append(tuple(mass.shape[2:])) or weigh(mass, *rest),
    )
    monkeypatch.setattr(block_scores, "QUERY_CHUNK", 16)
    choose(*drawn(60, cut), cut, size=4, count=4)
    assert shapes == [(16, 7), (16, 15), (16, 23), (12, 29)]


class TestFla:
    """flash-linear-attention's plain functions: blocks of one size, forced {first, own, previous},
    its choice by the mean over heads.
    """

    @pytest.fixture
    def fla(self):
        return pytest.importorskip("fla.ops.nsa.naive")

    def test_choices(self, fla):
        cut, count = BlockLayout(8, 8), 5
        q, k = drawn(120, cut, scale=1.0)
        theirs = fla.naive_nsa_topk(q.float(), k.float(), count, 8, 1 / math.sqrt(8))
        found = choose(q, k, cut, size=8, count=count)
        for b in range(2):
            for g in range(2):
                for t in range(120):
                    chosen = sorted(j for j in theirs[b, t, g].tolist() if j >= 0)
                    # A short row: it fills up with blocks that are not over, and are not seen.
                    assert [j for j in chosen if j <= t // 8] == found[b][g][t]

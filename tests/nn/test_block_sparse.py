"""Block-sparse attention: three implementations of one sum, gradients, memory."""

import pytest
import torch
from torch.autograd import gradcheck

from tinsmith.nn.attention import block_sparse
from tinsmith.nn.attention.block_sparse import attend_topk_blocks, by_block, by_query, naive
from tinsmith.nn.attention.core import attend
from tinsmith.nn.attention.span import Span

SIZE = 4


def inputs(queries, keys, rows=2, heads=4, groups=2, width=8, dtype=torch.float64, scale=1.0):
    source = torch.Generator().manual_seed(queries * 1000 + keys)

    def normal(*shape):
        x = scale * torch.randn(*shape, generator=source, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    k = normal(rows, keys, groups, width)
    return normal(rows, queries, heads, width), k, normal(rows, keys, groups, width)


def choices(queries, keys, count, rows=2, groups=2, offset=0):
    """Random blocks at or before each query, its own among them; some queries choose fewer, one
    row's first query is padding. Blocks are counted from `offset` in the second row.
    """
    source = torch.Generator().manual_seed(queries + keys)
    place = torch.arange(keys - queries, keys).repeat(rows, 1)
    begins = torch.full((rows, groups, queries, count), -1)
    for b in range(rows):
        start = offset if b else 0
        for t in range(queries):
            if place[b, t] < start:
                continue
            own = (int(place[b, t]) - start) // SIZE
            for g in range(groups):
                others = torch.randperm(own, generator=source)[: count - 1]
                picked = start + SIZE * torch.cat((others, torch.tensor([own])))
                begins[b, g, t, : len(picked)] = picked
    place[-1, 0], begins[-1, :, 0] = -1, -1
    return begins, place


def with_gradients(y, tensors):
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), tensors)]


@pytest.mark.parametrize("way", [by_query, by_block])
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (1, 9), (3, 3), (4, 4), (5, 5), (7, 30), (97, 97), (128, 130)]
)
def test_every_implementation_equals_the_formula_with_gradients(way, queries, keys, monkeypatch):
    monkeypatch.setattr(block_sparse, "QUERY_CHUNK", 7)
    tensors = inputs(queries, keys)
    chosen = choices(queries, keys, 3, offset=2 if keys > 2 else 0)
    found = with_gradients(way(*tensors, *chosen, SIZE), tensors)
    formula = with_gradients(naive(*tensors, *chosen, SIZE), tensors)
    for mine, expected in zip(found, formula, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", [naive, by_query, by_block])
def test_all_blocks_selected_equals_causal_attention(way):
    tensors = inputs(30, 30)
    begins = SIZE * torch.arange(8).expand(2, 2, 30, 8)
    begins = begins.where(begins <= torch.arange(30)[:, None], -1)
    found = with_gradients(way(*tensors, begins, torch.arange(30)[None], SIZE), tensors)
    dense = with_gradients(attend(*tensors, Span(), kind="naive"), tensors)
    for mine, expected in zip(found, dense, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", [naive, by_query, by_block])
def test_a_query_without_selected_blocks_gets_zero(way):
    tensors = inputs(5, 5)
    begins = torch.full((2, 2, 5, 3), -1)
    begins[0, :, 3, 1] = 0
    y = way(*tensors, begins, torch.arange(5)[None], SIZE)
    silent = torch.ones(2, 5, dtype=torch.bool)
    silent[0, 3] = False
    assert (y[silent] == 0).all()
    assert (y[0, 3] != 0).all()
    gradients = torch.autograd.grad(y.square().sum(), tensors)
    assert all(x.isfinite().all() for x in gradients)
    assert (gradients[0][silent] == 0).all()


@pytest.mark.parametrize("way", [by_query, by_block])
def test_gradients_equal_finite_differences(way):
    tensors = inputs(6, 6, rows=1, width=2)
    chosen = choices(6, 6, 2, rows=1)
    assert gradcheck(lambda q, k, v: way(q, k, v, *chosen, SIZE), tensors)


def test_large_scores_do_not_overflow():
    tensors, chosen = inputs(40, 40, scale=30.0, dtype=torch.float32), choices(40, 40, 3)
    found = with_gradients(by_block(*tensors, *chosen, SIZE), tensors)
    formula = with_gradients(naive(*tensors, *chosen, SIZE), tensors)
    for mine, expected in zip(found, formula, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", [naive, by_query, by_block])
def test_half_precision_is_as_exact_as_its_inputs(way, dtype):
    tensors, chosen = inputs(40, 40, dtype=dtype), choices(40, 40, 3)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    found = with_gradients(way(*tensors, *chosen, SIZE), tensors)
    truth = with_gradients(naive(*exact, *chosen, SIZE), exact)
    for mine, expected in zip(found, truth, strict=True):
        assert mine.dtype == dtype
        error = (mine.double() - expected).norm() / expected.norm()
        assert error < 3 * torch.finfo(dtype).eps


def test_few_queries_use_gather_and_many_use_sorting(monkeypatch):
    taken = []
    for name in ("naive", "by_query", "by_block"):
        way = getattr(block_sparse, name)
        monkeypatch.setattr(
            block_sparse,
            name,
            lambda *args, _way=way, _name=name: taken.append(_name) or _way(*args),
        )
    for queries, reported in (
        (1, {}),
        (16, {}),
        (17, {}),
        (17, {"kind": "naive"}),
        (1, {"dropout": 0.5}),
    ):
        attend_topk_blocks(*inputs(queries, 20), *choices(queries, 20, 3), SIZE, **reported)
    assert taken == ["by_query", "by_query", "by_block", "naive", "naive"]


def test_only_selected_blocks_are_multiplied(monkeypatch):
    """Products of keys with queries: as many as there are pairs, whatever the length."""
    pairs, scores = [], block_sparse._scores

    def counted(q_PJD, k_SD, block, *rest):
        pairs.append(len(q_PJD) * (block.stop - block.start))
        return scores(q_PJD, k_SD, block, *rest)

    monkeypatch.setattr(block_sparse, "_scores", counted)
    for length in (64, 128):
        pairs.clear()
        begins, place = choices(length, length, 3, rows=1)
        by_block(*inputs(length, length, rows=1), begins, place, SIZE)
        assert sum(pairs) == SIZE * int((begins >= 0).sum())
        assert max(pairs) <= block_sparse.QUERY_CHUNK * SIZE


def test_it_compiles_to_one_operator():
    tensors, (begins, place) = inputs(40, 40), choices(40, 40, 3)

    def call(q, k, v):
        return by_block(2 * q, k, v, begins, place, SIZE)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for mine, expected in zip(
        with_gradients(compiled(*tensors), tensors),
        with_gradients(call(*tensors), tensors),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected)


def test_empty_batches_and_queries_are_supported():
    tensors = inputs(20, 20)
    begins, place = choices(20, 20, 3)
    none = [x[:0] for x in tensors]
    assert by_block(*none, begins[:0], place[:1], SIZE).shape == (0, 20, 4, 8)
    q, k, v = tensors
    assert by_query(q[:, :0], k, v, begins[:, :, :0], place[:, :0], SIZE).shape == (2, 0, 4, 8)

"""Attention by blocks of queries: the plain formula, its gradients, its memory."""

import pytest
import torch
from torch.autograd import gradcheck

from tinsmith.nn.attention import cpu as blocks
from tinsmith.nn.attention.core import attend
from tinsmith.nn.attention.cpu import blockwise_attention
from tinsmith.nn.attention.span import Span, attention_span


def inputs(queries, keys, heads=4, groups=2, width=8, value_width=8, rows=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(queries * 1000 + keys)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    q = normal(rows, queries, heads, width)
    return q, normal(rows, keys, groups, width), normal(rows, keys, groups, value_width)


def reaches(length):
    generator = torch.Generator().manual_seed(length)
    border = torch.rand(2, length, generator=generator) < 0.05
    documents = border.cumsum(1)
    padded = documents.masked_fill(torch.arange(length) < torch.tensor([[0], [length // 3]]), -1)
    device = torch.device("cpu")
    return {
        "causal": Span(),
        "documents": attention_span(documents, length, None, device),
        "window": attention_span(None, length, 7, device),
        "window in documents": attention_span(documents, length, 40, device),
        "padding": attention_span(padded, length, None, device),
    }


def with_gradients(y, tensors):
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), tensors)]


@pytest.mark.parametrize("length", [2, 63, 64, 65, 97, 256])
@pytest.mark.parametrize("kind", list(reaches(2)))
def test_blockwise_attention_equals_the_formula_with_gradients(length, kind):
    tensors, seen = inputs(length, length), reaches(length)[kind]
    ours = with_gradients(blockwise_attention(*tensors, seen.low_BT, seen.high_BT), tensors)
    formula = with_gradients(attend(*tensors, seen, kind="naive"), tensors)
    for mine, expected in zip(ours, formula, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("queries", "keys"), [(2, 9), (64, 65), (70, 200)])
def test_queries_may_be_the_last_of_more_keys(queries, keys):
    tensors = inputs(queries, keys)
    ours = with_gradients(blockwise_attention(*tensors, None, None), tensors)
    formula = with_gradients(attend(*tensors, Span(), kind="naive"), tensors)
    for mine, expected in zip(ours, formula, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)


def test_values_may_be_wider_than_keys_and_gradients_equal_finite_differences(monkeypatch):
    monkeypatch.setattr(blocks, "QUERY_BLOCK", 3)
    tensors, seen = inputs(7, 7, width=2, value_width=5), reaches(7)["window in documents"]
    y = blockwise_attention(*tensors, seen.low_BT, seen.high_BT)
    assert y.shape == (2, 7, 4, 5)
    assert gradcheck(
        lambda q, k, v: blockwise_attention(q, k, v, seen.low_BT, seen.high_BT), tensors
    )


def test_keys_out_of_reach_are_not_multiplied(monkeypatch):
    seen, sizes = reaches(256)["window"], []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda x, axis: sizes.append(x.shape[-1]) or softmax(x, axis)
    )
    blockwise_attention(*inputs(256, 256), seen.low_BT, seen.high_BT)
    assert sizes == [64, 70, 70, 70]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_accurate_as_torchs_kernel(dtype):
    exact = inputs(200, 200, width=32, value_width=32)
    rounded = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]
    truth = with_gradients(attend(*exact, Span(), kind="naive"), exact)
    ours = with_gradients(blockwise_attention(*rounded, None, None), rounded)
    q, k, v = (tensor.transpose(1, 2) for tensor in rounded)
    theirs = with_gradients(
        torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        ).transpose(1, 2),
        rounded,
    )
    for mine, other, expected in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == dtype
        assert (mine - expected).norm() <= 2 * (other - expected).norm()


def test_float16_whose_scores_would_overflow_goes_to_torchs_kernel():
    q = torch.full((1, 4, 2, 64), 100.0, dtype=torch.float16, requires_grad=True)
    assert attend(q, q, q, Span()).isfinite().all()


def test_it_compiles_to_one_operator():
    tensors, seen = inputs(70, 70, dtype=torch.float32), reaches(70)["documents"]

    def call(q, k, v, low, high):
        return blockwise_attention(2 * q, k, v, low, high)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ours = with_gradients(compiled(*tensors, seen.low_BT, seen.high_BT), tensors)
    plain = with_gradients(call(*tensors, seen.low_BT, seen.high_BT), tensors)
    for mine, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, expected)

"""Chunked cross-entropy equals the whole, and masked tokens have no part in it."""

import pytest
import torch
from torch import nn

from tinsmith.objectives import logprobs


@pytest.fixture
def case(monkeypatch):
    """hidden (2, 20, 16), targets, weights, head, in float64; chunks of six tokens."""
    monkeypatch.setattr(logprobs, "ELEMENTS", 300)
    hidden = torch.randn(2, 20, 16, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(16, 50, bias=False, dtype=torch.float64)
    weights = torch.rand(2, 20, dtype=torch.float64) * (torch.rand(2, 20) > 0.3)
    return hidden, torch.randint(0, 50, (2, 20)), weights, head


def whole(hidden, targets, weights, head):
    nll = nn.functional.cross_entropy(
        head(hidden).flatten(0, 1), targets.flatten(), reduction="none"
    )
    return (nll * weights.flatten()).sum()


def test_sum_and_gradients_equal_the_whole(case):
    hidden, targets, weights, head = case
    found = torch.autograd.grad(
        3 * logprobs.summed_nll(hidden, targets, weights, head), [hidden, head.weight]
    )
    expected = torch.autograd.grad(3 * whole(*case), [hidden, head.weight])
    assert torch.allclose(logprobs.summed_nll(*case), whole(*case), atol=1e-12)
    for one, two in zip(found, expected, strict=True):
        assert torch.allclose(one, two, atol=1e-12)


def test_masked_positions_get_exactly_zero_gradient(case):
    hidden, _, weights, _ = case
    (grad,) = torch.autograd.grad(logprobs.summed_nll(*case), [hidden])
    assert bool((grad[weights == 0] == 0).all())
    assert bool((grad[weights != 0] != 0).any(-1).all())


def test_a_batch_without_units_is_zero_and_has_zero_gradient(case):
    hidden, targets, weights, head = case
    total = logprobs.summed_nll(hidden, targets, weights * 0, head)
    total.backward()
    assert total.item() == 0
    assert hidden.grad is not None
    assert bool((hidden.grad == 0).all())
    assert bool((head.weight.grad == 0).all())


def test_nothing_of_tokens_by_vocabulary_is_kept_for_the_backward_pass(case):
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs.summed_nll(*case)
    assert max(saved) <= max(case[0].numel(), case[3].weight.numel())


def test_a_frozen_head_has_no_gradient_and_none_is_made(case):
    hidden, _, _, head = case
    (expected,) = torch.autograd.grad(logprobs.summed_nll(*case), [hidden])
    head.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        logprobs.summed_nll(*case)
    assert head.weight.shape not in {tensor.shape for tensor in saved}
    (found,) = torch.autograd.grad(logprobs.summed_nll(*case), [hidden])
    assert torch.equal(found, expected)


def test_gradcheck(case):
    hidden, targets, weights, head = case
    small = hidden.detach()[:1, :3].clone().requires_grad_()
    torch.autograd.gradcheck(
        lambda h: logprobs.summed_nll(h, targets[:1, :3], weights[:1, :3], head), [small]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_to_float32(dtype):
    hidden = torch.randn(4, 64, 32, requires_grad=True)
    head = nn.Linear(32, 200, bias=False)
    targets, weights = torch.randint(0, 200, (4, 64)), torch.ones(4, 64)
    exact = whole(hidden, targets, weights, head)
    with torch.autocast("cpu", dtype):
        total = logprobs.summed_nll(hidden, targets, weights, head)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(exact.item(), rel=0.01)
    (one,) = torch.autograd.grad(total, [hidden])
    (two,) = torch.autograd.grad(exact, [hidden])
    assert one.dtype == torch.float32
    assert float((one - two).norm() / two.norm()) < 0.02


def test_token_nll_equals_cross_entropy(case):
    hidden, targets, _, head = case
    found = logprobs.token_nll(hidden.flatten(0, 1), targets.flatten(), head)
    expected = nn.functional.cross_entropy(
        head(hidden).flatten(0, 1), targets.flatten(), reduction="none"
    )
    assert torch.allclose(found, expected, atol=1e-12)
    assert not found.requires_grad
    assert len(logprobs.token_nll(hidden.flatten(0, 1)[:0], targets.flatten()[:0], head)) == 0

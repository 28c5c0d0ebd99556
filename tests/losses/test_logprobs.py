"""Chunked log-probabilities equal the whole, masked tokens have no part in them, and estimators of
KL divergence estimate what they say.
"""

import pytest
import torch
from torch import nn

from tinsmith.losses import chunked_head, logprobs


@pytest.fixture
def case(monkeypatch):
    """hidden (2, 20, 16), targets, weights, head, in float64; chunks of six tokens."""
    monkeypatch.setattr(chunked_head, "MAX_CHUNK_LOGITS", 300)
    monkeypatch.setattr(chunked_head, "MIN_CHUNK_TOKENS", 1)
    hidden = torch.randn(2, 20, 16, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(16, 50, bias=False, dtype=torch.float64)
    weights = torch.rand(2, 20, dtype=torch.float64) * (torch.rand(2, 20) > 0.3)
    return hidden, torch.randint(0, 50, (2, 20)), weights, head


def whole(hidden, targets, weights, head):
    nll = nn.functional.cross_entropy(
        head(hidden).flatten(0, 1), targets.flatten(), reduction="none"
    )
    return (nll * weights.flatten()).sum()


def test_chunked_sum_and_gradients_equal_the_unchunked(case):
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


def test_a_batch_without_targets_has_zero_loss_and_gradient(case):
    hidden, targets, weights, head = case
    total = logprobs.summed_nll(hidden, targets, weights * 0, head)
    total.backward()
    assert total.item() == 0
    assert hidden.grad is not None
    assert bool((hidden.grad == 0).all())
    assert bool((head.weight.grad == 0).all())


def test_no_tensor_of_tokens_by_vocabulary_is_saved_for_backward(case):
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs.summed_nll(*case)
    assert max(saved) <= max(case[0].numel(), case[3].weight.numel())


def test_no_gradient_is_computed_for_a_frozen_head(case):
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


def test_token_logprobs_equal_log_softmax_and_its_gradient():
    logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    ids, scale = torch.randint(7, (2, 5)), torch.randn(2, 5, dtype=torch.float64)
    found = logprobs.token_logprobs(logits, ids)
    expected = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert torch.allclose(found, expected, atol=1e-12)
    (one,) = torch.autograd.grad((found * scale).sum(), [logits])
    (two,) = torch.autograd.grad((expected * scale).sum(), [logits])
    assert torch.allclose(one, two, atol=1e-12)
    assert logprobs.token_logprobs(logits.bfloat16(), ids).dtype == torch.float32


def test_token_logprobs_equal_trl(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    utils = pytest.importorskip("trl.trainer.utils")
    logits, ids = torch.randn(3, 6, 40, dtype=torch.float64), torch.randint(40, (3, 6))
    expected = utils.selective_log_softmax(logits, ids)
    assert torch.allclose(logprobs.token_logprobs(logits, ids), expected, atol=1e-12)


def whole_logprobs(hidden, ids, mask, head, temperature):
    return logprobs.token_logprobs(head(hidden) / temperature, ids).where(mask, 0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logprobs_and_gradients_equal_the_unchunked(case, temperature):
    hidden, ids, weights, head = case
    mask, upstream = weights > 0, torch.randn(2, 20, dtype=torch.float64)
    found = logprobs.target_logprobs(hidden, ids, mask, head, temperature)
    expected = whole_logprobs(hidden, ids, mask, head, temperature)
    assert torch.allclose(found, expected, atol=1e-12)
    ones = torch.autograd.grad((found.exp() * upstream).sum(), [hidden, head.weight])
    twos = torch.autograd.grad((expected.exp() * upstream).sum(), [hidden, head.weight])
    for one, two in zip(ones, twos, strict=True):
        assert torch.allclose(one, two, atol=1e-12)
    assert bool((ones[0][~mask] == 0).all())
    assert bool((found[~mask] == 0).all())


def test_chunked_logprobs_without_tokens_are_zero_with_zero_gradient(case):
    hidden, ids, weights, head = case
    logprobs.target_logprobs(hidden, ids, weights * 0, head).sum().backward()
    assert bool((hidden.grad == 0).all())
    assert bool((head.weight.grad == 0).all())


def test_chunked_logprobs_save_no_tensor_of_tokens_by_vocabulary(case):
    hidden, ids, weights, head = case
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        logprobs.target_logprobs(hidden, ids, weights, head)
    assert max(saved) <= max(hidden.numel(), head.weight.numel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunked_logprobs_under_autocast_are_close_to_float32(dtype):
    hidden = torch.randn(4, 64, 32, requires_grad=True)
    head = nn.Linear(32, 200, bias=False)
    ids, mask = torch.randint(0, 200, (4, 64)), torch.ones(4, 64, dtype=torch.bool)
    exact = whole_logprobs(hidden, ids, mask, head, 1.0)
    with torch.autocast("cpu", dtype):
        found = logprobs.target_logprobs(hidden, ids, mask, head)
    assert found.dtype == torch.float32
    assert float((found - exact).detach().abs().max()) < 0.1
    (one,) = torch.autograd.grad(found.sum(), [hidden])
    (two,) = torch.autograd.grad(exact.sum(), [hidden])
    assert float((one - two).norm() / two.norm()) < 0.02


@pytest.fixture
def policies():
    """Logits of a policy (with gradient) and of its reference over nine tokens, float64."""
    policy = torch.randn(9, dtype=torch.float64, requires_grad=True)
    return policy, torch.randn(9, dtype=torch.float64)


def expected_gradient(policy, reference, estimator):
    """E over the policy's samples of the gradient of an estimate, by enumeration."""
    total = torch.zeros_like(policy)
    for token in range(len(policy)):
        logprob = policy.log_softmax(0)[token]
        estimate = logprobs.kl(logprob, reference.log_softmax(0)[token], estimator)
        total += logprob.detach().exp() * torch.autograd.grad(estimate, policy)[0]
    return total


def divergence(one, two):
    p, q = one.log_softmax(0), two.log_softmax(0)
    return (p.exp() * (p - q)).sum()


def test_E_grad_k1_is_zero(policies):
    assert float(expected_gradient(*policies, "k1").abs().max()) < 1e-12


def test_E_grad_k2_is_the_gradient_of_reverse_kl(policies):
    (exact,) = torch.autograd.grad(divergence(*policies), policies[0])
    assert float(exact.abs().max()) > 0.01
    assert torch.allclose(expected_gradient(*policies, "k2"), exact, atol=1e-12)


def test_E_grad_k3_is_the_gradient_of_forward_kl(policies):
    (exact,) = torch.autograd.grad(divergence(*reversed(policies)), policies[0])
    assert float(exact.abs().max()) > 0.01
    assert torch.allclose(expected_gradient(*policies, "k3"), exact, atol=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(policies, estimator):
    p, q = (logits.log_softmax(0).detach() for logits in policies)
    mean = (p.exp() * logprobs.kl(p, q, estimator)).sum()
    assert torch.allclose(mean, divergence(*policies), atol=1e-12)


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="estimator=k4"):
        logprobs.kl(torch.zeros(1, 1), torch.zeros(1, 1), "k4")

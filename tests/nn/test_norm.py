"""Norms against torch's and transformers', in every precision."""

import pytest
import torch
import torch.nn.functional as F

from tinsmith.nn.layers.norm import LayerNorm, RMSNorm
from tinsmith.nn.precision import at_least_fp32

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def stirred(norm, dtype):
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=source)
    return norm.to(dtype)


def drawn(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )


def test_rms_norm_equals_the_formula():
    norm, x = stirred(RMSNorm(16, 1e-3), torch.float64), drawn(2, 5, 16)
    expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (16,), norm.weight, 1e-3))


def test_layer_norm_equals_the_formula():
    norm, x = stirred(LayerNorm(16, 1e-3), torch.float64), drawn(2, 5, 16)
    middle = x - x.mean(-1, keepdim=True)
    expected = norm.weight * middle / (middle.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x), expected + norm.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_equals_that_of_llama(dtype):
    """Llama rounds once more, before the weight: equal up to that."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = stirred(RMSNorm(64, 1e-5), dtype)
    theirs = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    theirs.load_state_dict(norm.state_dict())
    x = drawn(2, 5, 64, dtype=dtype)
    error = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(norm(x), theirs(x), rtol=error, atol=error)


def test_A1_the_norm_scales_its_input():
    """gamma * rsqrt(mean x^2) without x is constant over channels and shrinks as x grows."""
    norm, x = RMSNorm(16, 1e-6).double(), drawn(3, 16)
    torch.testing.assert_close(F.cosine_similarity(norm(x), x), torch.ones(3, dtype=x.dtype))
    torch.testing.assert_close(norm(10 * x), norm(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm(-x), -norm(x))


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("size", [256.0, 300.0, 30_000.0])
def test_B1_large_fp16_inputs_do_not_vanish(norm, size):
    """256^2 is infinite in fp16: squaring before the cast makes the norm return 0."""
    x = (drawn(4, 32).sign() * size).half()
    made = stirred(norm(32, 1e-5), torch.float16)
    found = made(x)
    assert found.dtype == torch.float16
    expected = made.float()(x.float())
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)
    assert found.abs().mean() > 0.5


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("inputs", DTYPES)
def test_the_output_has_the_dtype_of_the_input(norm, weights, inputs):
    assert stirred(norm(8, 1e-5), weights)(drawn(2, 8, dtype=inputs)).dtype == inputs


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_gradients_equal_finite_differences(norm):
    made = stirred(norm(6, 1e-2), torch.float64)
    x = drawn(2, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(made, (x,))
    parameters = [parameter.detach().requires_grad_() for parameter in made.parameters()]
    names = [name for name, _ in made.named_parameters()]

    def of_parameters(*values):
        reported = dict(zip(names, values, strict=True))
        return torch.func.functional_call(made, reported, (x.detach(),))

    assert torch.autograd.gradcheck(of_parameters, tuple(parameters))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_gradients_are_rounded_at_most_twice(norm, dtype):
    made = stirred(norm(64, 1e-5), dtype)
    exact = norm(64, 1e-5).double()
    exact.load_state_dict(made.state_dict())
    upstream, gradients = drawn(32, 64, dtype=dtype), []
    for module in (made, exact):
        kind = next(module.parameters()).dtype
        x = drawn(32, 64, dtype=dtype).to(kind).requires_grad_()
        module(x).backward(upstream.to(kind))
        gradients.append([x.grad, *(parameter.grad for parameter in module.parameters())])
    for found, expected in zip(*gradients, strict=True):
        assert found.dtype == dtype
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error < 2 * torch.finfo(dtype).eps


def test_frozen_weights_get_no_gradient_but_inputs_do():
    made, x = RMSNorm(8, 1e-5).requires_grad_(False), drawn(2, 8).float().requires_grad_()
    made(x).square().sum().backward()
    assert made.weight.grad is None
    assert x.grad.isfinite().all()


def test_statistics_are_at_least_float32():
    assert [at_least_fp32(dtype) for dtype in DTYPES] == [torch.float32] * 3 + [torch.float64]

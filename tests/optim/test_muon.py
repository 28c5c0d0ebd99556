"""Muon against torch's Muon on matrices, against itself slice by slice, and against the SVD."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tinsmith.optim import muon
from tinsmith.optim.muon import Muon, fast_matmul_dtype, newton_schulz

SHAPES = [(8, 8), (5, 12), (12, 5), (16, 4), (4, 16), (12, 5)]


def weights(
    shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64
) -> list[nn.Parameter]:
    source = torch.Generator().manual_seed(1)
    made = (torch.randn(s, generator=source, dtype=torch.float64).to(dtype) for s in shapes)
    return [nn.Parameter(w) for w in made]


def gradients(parameters: list[nn.Parameter], step: int) -> None:
    source = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
        parameter.grad = noise.to(parameter.dtype)


def run(
    parameters: list[nn.Parameter], *optimizers: torch.optim.Optimizer, steps: int = 10
) -> None:
    for step in range(steps):
        gradients(parameters, step)
        for optimizer in optimizers:
            optimizer.step()


@given(
    rows=st.integers(2, 24),
    columns=st.integers(2, 24),
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
@settings(derandomize=True, max_examples=50, deadline=None)
def test_newton_schulz_keeps_singular_vectors_and_brings_values_near_one(
    rows, columns, batch, seed
):
    source = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(batch, rows, rows, generator=source).double()).Q
    right = torch.linalg.qr(torch.randn(batch, columns, columns, generator=source).double()).Q
    side = min(rows, columns)
    values = torch.rand(batch, side, generator=source).double() * 0.9 + 0.1
    matrices = left[..., :side] @ torch.diag_embed(values) @ right[..., :side].mT
    core = left.mT @ newton_schulz(matrices, 5, torch.float64) @ right
    reached = core.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(core[..., :side, :side], torch.diag_embed(reached))
    assert reached.min() > 0.6
    assert reached.max() < 1.3


def test_newton_schulz_does_not_depend_on_the_size_of_its_input():
    matrix = torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    small, large = (newton_schulz(matrix * k, 5, torch.float64) for k in (1e-3, 1e6))
    torch.testing.assert_close(small, large)


def test_newton_schulz_does_not_change_its_input_and_keeps_zeros():
    for shape in [(4, 6), (6, 4), (2, 3, 5)]:
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        before = matrix.clone()
        assert newton_schulz(matrix, 5, torch.float32).shape == matrix.shape
        assert torch.equal(matrix, before)
        assert torch.equal(newton_schulz(torch.zeros(shape), 5, torch.float32), torch.zeros(shape))


def test_newton_schulz_in_bfloat16_is_close_to_float64():
    matrix = torch.randn(3, 48, 96, generator=torch.Generator().manual_seed(0))
    exact = newton_schulz(matrix.double(), 5, torch.float64)
    rough = newton_schulz(matrix, 5, torch.bfloat16)
    assert rough.dtype == torch.bfloat16
    assert (rough.double() - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torchs_on_matrices(monkeypatch, scale, nesterov):
    # torch's iteration always rounds to bfloat16; without the rounding both must agree exactly.
    monkeypatch.setattr(torch.Tensor, "bfloat16", Tensor.clone)
    ours, theirs = weights(SHAPES), weights(SHAPES)
    options = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    run(ours, Muon(ours, **options, scale=scale))
    run(theirs, torch.optim.Muon(theirs, **options, adjust_lr_fn=scale))
    for a, b, start in zip(ours, theirs, weights(SHAPES), strict=True):
        assert (a - start).abs().max() > 0.01
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_muon_in_bfloat16_products_stays_close_to_torchs():
    shapes = [(64, 64), (32, 96), (96, 32)]
    ours, theirs = weights(shapes, torch.float32), weights(shapes, torch.float32)
    run(ours, Muon(ours, ns_dtype=torch.bfloat16))
    run(theirs, torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0))
    for a, b, start in zip(ours, theirs, weights(shapes, torch.float32), strict=True):
        assert (a - b).norm() / (a - start).norm() < 0.03


@pytest.mark.parametrize("shape", [(3, 5, 9), (4, 9, 5), (1, 6, 6)])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_a_stack_is_updated_like_its_separate_slices(shape, scale):
    (stack,) = weights([shape])
    slices = [nn.Parameter(slice_.clone()) for slice_ in stack.detach()]
    whole = Muon([stack], scale=scale, weight_decay=0.01)
    apart = Muon(slices, scale=scale, weight_decay=0.01)
    for step in range(5):
        gradients([stack], step)
        for slice_, gradient in zip(slices, stack.grad, strict=True):
            slice_.grad = gradient
        whole.step()
        apart.step()
    torch.testing.assert_close(stack.detach(), torch.stack(slices).detach())


@pytest.mark.parametrize("room", [1, 100, 2**23])
def test_batches_of_any_size_equal_one_matrix_at_a_time(monkeypatch, room):
    shapes = [*SHAPES, (3, 5, 12), (2, 12, 5)]
    together, alone = weights(shapes), weights(shapes)
    run(alone, *(Muon([parameter]) for parameter in alone), steps=4)
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", room)
    run(together, Muon(together), steps=4)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_matrices_of_the_same_shape_share_one_iteration(monkeypatch):
    seen = []
    original = newton_schulz

    def spy(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
        seen.append(tuple(matrices.shape))
        return original(matrices, steps, dtype)

    monkeypatch.setattr(muon, "newton_schulz", spy)
    parameters = weights([(5, 12), (4, 4), (12, 5), (3, 12, 5)])
    run(parameters, Muon(parameters), steps=1)
    assert sorted(seen) == [(1, 4, 4), (5, 5, 12)]


def test_weight_decay_is_decoupled_from_gradient_and_scale():
    for scale in ("original", "match_rms_adamw"):
        parameters = weights([(12, 3), (2, 3, 12)])
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        before = [parameter.detach().clone() for parameter in parameters]
        Muon(parameters, lr=0.1, weight_decay=0.5, scale=scale).step()
        for parameter, start in zip(parameters, before, strict=True):
            torch.testing.assert_close(parameter.detach(), start * 0.95)


def test_gradients_are_not_changed_and_missing_ones_are_skipped():
    moved, left = weights([(4, 6), (4, 6)])
    gradients([moved], 0)
    given_gradient, before = moved.grad.clone(), left.detach().clone()
    optimizer = Muon([moved, left], weight_decay=0.1)
    optimizer.step()
    assert torch.equal(moved.grad, given_gradient)
    assert torch.equal(left, before)
    assert left not in optimizer.state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_momentum_is_at_least_float32(dtype):
    (parameter,) = weights([(4, 6)], dtype)
    optimizer = Muon([parameter])
    run([parameter], optimizer, steps=1)
    assert parameter.dtype == dtype
    momentum = optimizer.state[parameter]["momentum"]
    assert momentum.dtype == torch.promote_types(dtype, torch.float32)
    assert momentum.shape == parameter.shape


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("avx512", [True, False])
def test_products_are_bfloat16_only_on_devices_where_that_is_faster(monkeypatch, amx, avx512):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    expected = torch.bfloat16 if amx or avx512 else torch.float32
    assert fast_matmul_dtype(torch.zeros(2, 2)) == expected
    assert fast_matmul_dtype(torch.zeros(2, 2, dtype=torch.float64)) == torch.float64
    assert fast_matmul_dtype(torch.zeros(2, 2, device="meta")) == torch.float32


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"not \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))])

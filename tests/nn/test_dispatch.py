"""Dispatch and grouped products against dense masked einsums."""

import pytest
import torch

from tests.oracles.close import close_to
from tinsmith.nn.layers.linear import init_weights
from tinsmith.nn.moe.dispatch import DispatchPlan, combine, plan_from_indices, plan_from_mask
from tinsmith.nn.moe.experts import Experts
from tinsmith.nn.moe.grouped_gemm import (
    grouped_linear,
    grouped_linear_cuda,
    grouped_linear_loop,
    grouped_outer,
    grouped_outer_cuda,
    grouped_outer_loop,
)

same = close_to(1e-12)

CUDA = torch.cuda.is_available()

N, E, K, D, H = 23, 5, 2, 8, 12


def draw(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def mask():
    """Tokens with 0 to E experts; expert 3 has none."""
    chosen = draw(N, E) > 0.2
    chosen[:, 3] = False
    chosen[4] = False
    return chosen


def pairs(plan: DispatchPlan) -> list[tuple[int, int]]:
    """(expert, token), in order."""
    begins = [0, *plan.ends_E.tolist()]
    return [
        (expert, int(token))
        for expert in range(len(begins) - 1)
        for token in plan.tokens_P[begins[expert] : begins[expert + 1]]
    ]


def test_G5_a_plan_lists_exactly_the_selected_pairs_in_order(mask):
    expected = [(e, n) for e in range(E) for n in range(N) if mask[n, e]]
    plan = plan_from_mask(mask)
    assert pairs(plan) == expected
    assert len(plan.tokens_P) == len(expected)
    assert plan.load_E.tolist() == mask.sum(0).tolist()
    table = draw(N, E)
    assert plan.gather_weights(table).tolist() == [float(table[n, e]) for e, n in expected]


def test_a_plan_from_indices_equals_the_plan_from_their_mask():
    choices = draw(N, E).topk(K, -1).indices
    valid = torch.arange(N) % 4 != 0
    plan = plan_from_indices(choices, E, valid)
    mask = torch.zeros(N, E, dtype=torch.bool).scatter(1, choices, True) & valid[:, None]
    assert len(plan.tokens_P) == N * K
    assert pairs(plan) == pairs(plan_from_mask(mask))
    assert sorted(plan.flat_indices_P.tolist()) == list(range(N * K))
    table = draw(N, K)
    dense = torch.zeros(N, E, dtype=torch.float64).scatter(1, choices, table)
    wanted = plan_from_mask(mask).gather_weights(dense)
    assert plan.gather_weights(table)[: len(wanted)].tolist() == wanted.tolist()


def test_a_plan_of_fixed_shape_has_the_same_pairs(mask):
    static = torch.compile(plan_from_mask, backend="eager", fullgraph=True)(mask)
    assert len(static.tokens_P) == N * E
    assert pairs(static) == pairs(plan_from_mask(mask))
    assert plan_from_mask(mask.to("meta")).tokens_P.shape == (N * E,)


def test_no_expert_is_selected():
    plan = plan_from_mask(torch.zeros(N, E, dtype=torch.bool))
    experts = Experts(D, E, H, "swiglu").double()
    init_weights(experts, 1)
    y = combine(experts(draw(N, D), plan), plan.gather_weights(draw(N, E)), plan, N)
    assert torch.equal(y, torch.zeros(N, D, dtype=torch.float64))


@pytest.mark.parametrize("tail", [0, 3])
def test_G5_grouped_products_and_their_gradients_equal_dense_ones(mask, tail):
    plan = plan_from_mask(mask)
    count = len(plan.tokens_P)
    group = torch.repeat_interleave(torch.arange(E), plan.load_E)
    x, weight = draw(count + tail, D, seed=2).requires_grad_(), draw(E, H, D).requires_grad_()
    dy = draw(count + tail, H, seed=3)
    y = grouped_linear(x, weight, plan.ends_E)
    expected = torch.einsum("poi,pi->po", weight[group], x[:count])
    same(y[:count], expected)
    assert torch.equal(y[count:], torch.zeros(tail, H, dtype=torch.float64))
    found = torch.autograd.grad(y, (x, weight), dy)
    wanted = torch.autograd.grad(expected, (x, weight), dy[:count])
    same(found, wanted)
    assert not found[1][3].any()
    assert not found[0][count:].any()


def test_grouped_products_have_derivatives_of_any_order(mask):
    plan = plan_from_mask(mask[:6])
    x, dy = draw(len(plan.tokens_P), 3), draw(len(plan.tokens_P), 4, seed=4)
    weight, ends = draw(E, 4, 3), plan.ends_E
    for function, first, second in ((grouped_linear, x, weight), (grouped_outer, dy, x)):
        inputs = first.requires_grad_(), second.requires_grad_()
        assert torch.autograd.gradcheck(lambda a, b, f=function: f(a, b, ends), inputs)
        assert torch.autograd.gradgradcheck(lambda a, b, f=function: f(a, b, ends), inputs)


def test_operators_pass_opcheck(mask):
    plan = plan_from_mask(mask)
    x, weight = draw(len(plan.tokens_P), D).requires_grad_(), draw(E, H, D).requires_grad_()
    dy = draw(len(plan.tokens_P), H)
    torch.library.opcheck(torch.ops.tinsmith.grouped.default, (x, weight, plan.ends_E))
    torch.library.opcheck(torch.ops.tinsmith.grouped_outer.default, (dy, x, plan.ends_E))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loop_equals_torchs_grouped_product(mask, dtype):
    """Forward, by the weights, and by the rows, with a group without rows."""
    plan = plan_from_mask(mask)
    x, weight = draw(len(plan.tokens_P), 16, dtype=dtype), draw(E, 32, 16, dtype=dtype)
    dy = draw(len(plan.tokens_P), 32, seed=3, dtype=dtype)
    grouped_mm = torch.nn.functional.grouped_mm
    forward = grouped_mm(x, weight.mT, offs=plan.ends_E)
    by_weight = grouped_mm(dy.mT, x, offs=plan.ends_E)
    by_rows = grouped_mm(dy, weight, offs=plan.ends_E)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    same(grouped_linear_loop(x, weight, plan.ends_E), forward, tolerance)
    same(grouped_outer_loop(dy, x, plan.ends_E), by_weight, tolerance)
    same(grouped_linear_loop(dy, weight.mT, plan.ends_E), by_rows, tolerance)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("width", [16, 12])
def test_gpu_kernels_equal_the_loop(mask, device, tail, width):
    """Both products, the transposed weight of a backward pass, rows past the last end, a group
    without rows; and widths that torch's own kernel does not take.
    """
    plan = plan_from_mask(mask)
    count, kind = len(plan.tokens_P) + tail, {"dtype": torch.bfloat16}
    x, dy = draw(count, width, **kind).to(device), draw(count, 32, seed=3, **kind).to(device)
    weight, ends = draw(E, 32, width, **kind).to(device), plan.ends_E.to(device)
    for fast, loop, given in (
        (grouped_linear_cuda, grouped_linear_loop, (x, weight)),
        (grouped_linear_cuda, grouped_linear_loop, (dy, weight.mT)),
        (grouped_outer_cuda, grouped_outer_loop, (dy, x)),
    ):
        same(fast(*given, ends), loop(*given, ends), 2e-2)
    assert not grouped_linear_cuda(x, weight, ends)[count - tail :].any()
    assert grouped_linear_cuda(x[:0], weight, ends * 0).shape == (0, 32)


@pytest.mark.skipif(not CUDA, reason="no GPU")
def test_gpu_products_and_gradients_equal_those_of_a_cpu(mask):
    plan = plan_from_mask(mask)
    x = draw(len(plan.tokens_P) + 3, 16, dtype=torch.bfloat16)
    weight = draw(E, 32, 16, dtype=torch.bfloat16)
    found = []
    for device in ("cpu", "cuda"):
        given = [tensor.to(device).detach().requires_grad_() for tensor in (x, weight)]
        y = grouped_linear(*given, plan.ends_E.to(device))
        found.append([y.cpu(), *(dx.cpu() for dx in torch.autograd.grad(y.sum(), given))])
    same(found[0], found[1], 2e-2)


def test_autocast_casts_as_a_linear_layer():
    plan = plan_from_mask(torch.ones(4, E, dtype=torch.bool))
    x, weight = draw(4 * E, D, dtype=torch.float32), draw(E, H, D, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = grouped_linear(x, weight.requires_grad_(), plan.ends_E)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_an_expert_is_not_affected_by_tokens_that_did_not_select_it(mask):
    """The inputs of other experts do not change a bit, and NaN in them does not spread."""
    experts = Experts(D, E, H, "relu2").double()
    init_weights(experts, 1)
    plan, x = plan_from_mask(mask), draw(N, D)
    y = experts(x, plan)
    poisoned = x.clone()
    poisoned[4] = torch.nan
    with torch.no_grad():
        experts.up_proj.weight[3] = torch.nan
    assert torch.equal(experts(poisoned, plan), y)


@pytest.mark.parametrize(("activation", "matrices"), [("swiglu", 3), ("relu2", 2)])
def test_flops_are_counted_per_pair(activation, matrices):
    experts = Experts(D, E, H, activation)
    assert experts.flops() == 2 * matrices * D * H
    assert sum(p.numel() for p in experts.parameters()) == matrices * E * D * H


def test_experts_are_initialised_like_dense_layers():
    torch.manual_seed(0)
    experts = Experts(64, 4, 96, "swiglu")
    init_weights(experts, 8)
    assert experts.gate_proj is not None
    for stack, std in (
        (experts.gate_proj, 0.5 / 8),
        (experts.up_proj, 0.5 / 8),
        (experts.down_proj, 0.5 / 96**0.5 / 4),
    ):
        for matrix in stack.weight:
            assert matrix.std().item() == pytest.approx(std, rel=0.05)

"""The cosine router and its sparsity and diversity loss (promises G and S)."""

import math

import pytest
import torch
import torch.nn.functional as F

from tinsmith.core.parse import parse
from tinsmith.nn.moe.cosine_router import KAPPA, CosineRouter, CosineRouterConfig, above_threshold
from tinsmith.nn.precision import at_least_fp32

N, E, D = 40, 8, 16


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=made, dtype=torch.float64)


def made(experts: int = E, dim: int = D, stirred: bool = True, **keys) -> CosineRouter:
    torch.manual_seed(0)
    gate = CosineRouter(CosineRouterConfig(experts=experts, **keys), dim, layer_idx=0).double()
    if stirred:
        with torch.no_grad():
            gate.prototypes += 0.1 * draw(experts, dim, seed=5)
            gate.thresholds += 0.1 * draw(experts, seed=6)
    return gate


def by_hand(gate: CosineRouter, x: torch.Tensor) -> torch.Tensor:
    """u, pair by pair."""
    p, thresholds = gate.prototypes.detach(), gate.thresholds.detach()
    return torch.stack(
        [
            torch.stack([(t @ p[e]) / (t.norm() * p[e].norm()) - thresholds[e] for e in range(E)])
            for t in x
        ]
    )


def test_margins_are_cosines_above_thresholds():
    gate, x = made(), draw(N, D)
    torch.testing.assert_close(gate.margins(x), by_hand(gate, x), rtol=0, atol=1e-14)
    assert torch.equal(gate(x).mask_NE.any(-1), torch.ones(N, dtype=torch.bool))


def test_G1_decision_does_not_depend_on_lengths_or_temperature():
    gate, x = made(), draw(N, D)
    expected = gate(x).mask_NE
    assert torch.equal(gate(x * torch.logspace(-3, 3, N)[:, None]).mask_NE, expected)
    with torch.no_grad():
        gate.prototypes *= torch.logspace(-2, 2, E)[:, None]
    assert torch.equal(gate(x).mask_NE, expected)
    p, thresholds = gate.prototypes.detach(), gate.thresholds.detach()
    cosine = torch.nn.functional.cosine_similarity(x[:, None], p[None], dim=-1)
    for temperature in (0.1, 1.0, 30.0):
        paper = (temperature * cosine).sigmoid() > (temperature * thresholds).sigmoid()
        routed = paper.any(-1)
        assert routed.sum() > N / 2
        assert torch.equal(paper[routed], expected[routed])


def test_G2_the_straight_through_value_equals_the_decision_to_the_bit():
    gate = made(combine="sum")
    choice = gate(draw(N, D))
    assert choice.weight_NE.requires_grad
    assert torch.equal(choice.weight_NE, choice.mask_NE.double())


@pytest.mark.parametrize("combine", ["mean", "sum", "rescaled_sum"])
def test_G3_weights_and_their_gradient(combine):
    """c = m, m / k or m E / k, with k a constant; dm/du = kappa s (1 - s)."""
    gate, x = made(combine=combine), draw(N, D)
    choice = gate(x)
    k = choice.mask_NE.sum(-1, keepdim=True).double()
    factor = {"mean": 1 / k, "sum": torch.ones_like(k), "rescaled_sum": E / k}[combine]
    expected = (choice.mask_NE * factor).double()
    torch.testing.assert_close(choice.weight_NE, expected, rtol=0, atol=1e-15)
    upstream = draw(N, E, seed=3)
    (found,) = torch.autograd.grad((choice.weight_NE * upstream).sum(), gate.thresholds)
    soft = (KAPPA * gate.margins(x)).sigmoid()
    slope = -(upstream * factor * KAPPA * soft * (1 - soft)).sum(0)
    torch.testing.assert_close(found, slope, rtol=1e-12, atol=1e-12)


def test_G4_an_expert_that_is_never_selected_has_no_gradient():
    gate, x = made(), draw(N, D)
    with torch.no_grad():
        gate.thresholds[3] = 2.0
    choice = gate(x)
    assert not choice.mask_NE[:, 3].any()
    upstream = draw(N, E, seed=3)
    (choice.weight_NE * upstream)[choice.mask_NE].sum().backward()
    for parameter in (gate.prototypes, gate.thresholds):
        assert (parameter.grad[3] == 0).all()
        assert (parameter.grad[:3] != 0).any()


def test_G6_half_of_the_experts_are_selected_at_initialisation():
    gate = made(experts=32, dim=64, stirred=False)
    x = draw(4000, 64)
    load = gate(x).stats["load"].sum() / 4000
    # the signs of 32 independent half-space tests: variance 32 / 4 per token
    assert abs(float(load) - 16) < 3 * math.sqrt(8 / 4000)
    unit = gate.prototypes @ gate.prototypes.T / 64
    torch.testing.assert_close(unit, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-6)


def test_prototypes_have_equal_lengths_with_more_experts_than_dimensions():
    lengths = made(experts=40, stirred=False).prototypes.norm(dim=-1)
    expected = torch.full_like(lengths, math.sqrt(D))
    torch.testing.assert_close(lengths, expected, rtol=0, atol=1e-5)


def test_a_step_of_adam_rotates_prototypes_by_about_its_rate():
    """Of unit length they would turn by sqrt(D) times as much: routes would not stand still long
    enough for experts to learn theirs (LOG.md).
    """
    gate = made(dim=256, stirred=False)
    before = F.normalize(gate.prototypes.detach().clone(), dim=-1)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.01)
    gate.prototypes.grad = draw(*gate.prototypes.shape, seed=3)
    optimizer.step()
    turned = (before * F.normalize(gate.prototypes.detach(), dim=-1)).sum(-1).acos()
    assert (turned < 0.011).all()
    assert (turned > 0.009).all()


def test_G7_permuting_experts_permutes_decisions():
    gate, x = made(), draw(N, D)
    expected = gate(x)
    order = torch.randperm(E, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        gate.prototypes.copy_(gate.prototypes[order].clone())
        gate.thresholds.copy_(gate.thresholds[order].clone())
    found = gate(x)
    assert torch.equal(found.mask_NE, expected.mask_NE[:, order])
    assert torch.equal(found.stats["load"], expected.stats["load"][order])


def test_G8_padding_is_neither_routed_nor_counted():
    gate, x = made(), draw(N, D)
    valid = torch.arange(N) % 3 != 0
    found, alone = gate(x, valid), gate(x[valid])
    assert not found.mask_NE[~valid].any()
    assert torch.equal(found.mask_NE[valid], alone.mask_NE)
    torch.testing.assert_close(found.stats, alone.stats)
    torch.testing.assert_close(found.losses, alone.losses)
    assert found.stats["tokens"] == valid.sum()


def test_G9_half_precision_inputs_give_the_same_decisions_away_from_the_boundary():
    gate, x = made(), draw(N, D)
    u = gate.margins(x)
    clear = u.abs() > 1e-2
    assert clear.float().mean() > 0.9
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            gate.to(torch.float32)
            found = gate.margins(x.to(dtype))
        assert found.dtype == at_least_fp32(dtype)
        assert torch.equal(above_threshold(found)[clear], above_threshold(u)[clear])


def test_casts_do_not_round_prototypes_and_thresholds():
    """Rounded ones would select other experts."""
    gate = made().float()
    before = {name: value.detach().clone() for name, value in gate.named_parameters()}
    x = draw(N, D).float()
    mask = gate(x).mask_NE
    for cast in (gate.bfloat16, gate.half, lambda: gate.to(torch.bfloat16)):
        cast()
        for name, value in gate.named_parameters():
            assert value.dtype == torch.float32, name
            assert torch.equal(value, before[name]), name
    assert torch.equal(gate(x).mask_NE, mask)
    assert gate.double().thresholds.dtype == torch.float64
    assert gate.to("meta").prototypes.is_meta


def test_a_cosine_of_zero_does_not_exceed_the_threshold_for_any_rounding():
    gate = made(stirred=False)
    x = draw(N, D)
    away = x - x @ gate.prototypes[2:3].T * gate.prototypes[2:3] / gate.prototypes[2].norm() ** 2
    assert (gate.margins(away)[:, 2] != 0).any()
    assert not gate(away).mask_NE[:, 2].any()
    assert gate(torch.zeros(3, D).double()).stats["fallback"] == 3


@pytest.mark.parametrize("training", [True, False])
def test_a_token_without_an_active_expert_gets_its_best_expert(training):
    gate, x = made().train(training), draw(N, D)
    with torch.no_grad():
        gate.thresholds += 0.3
    fired = above_threshold(gate.margins(x))
    silent = ~fired.any(-1)
    assert 0 < silent.sum() < N
    choice = gate(x)
    best = gate.margins(x).argmax(-1)
    expected = fired.clone()
    expected[silent, best[silent]] = True
    assert torch.equal(choice.mask_NE, expected)
    assert (choice.weight_NE[silent, best[silent]] == 1).all()
    assert choice.stats["fallback"] == silent.sum()
    assert torch.equal(choice.stats["load"], fired.sum(0))


def test_other_fallbacks():
    x = draw(N, D)
    for kind, training, routed in (
        ("none", True, False),
        ("none", False, False),
        ("none_in_training", True, False),
        ("none_in_training", False, True),
    ):
        gate = made(fallback=kind).train(training)
        with torch.no_grad():
            gate.thresholds += 2
        choice = gate(x)
        assert bool(choice.mask_NE.any()) == routed
        assert choice.weight_NE.isfinite().all()
        assert choice.stats["fallback"] == N


def test_without_a_task_gradient_weights_are_constants():
    gate, x = made(), draw(N, D).requires_grad_()
    choice = gate(x, differentiable=False)
    assert not choice.weight_NE.requires_grad
    assert choice.losses["sdl"].requires_grad
    assert torch.equal(choice.weight_NE, gate(x).weight_NE)


def test_losses_exist_in_training_only():
    gate, x = made(), draw(N, D)
    assert gate.eval()(x).losses == {}
    with torch.no_grad():
        assert gate.train()(x).losses == {}


def diversity(gate: CosineRouter) -> torch.Tensor:
    """SDL with first term 0: the target equals the number of active experts."""
    x = draw(N, D)
    mean = float(gate(x).stats["load"].sum() / N)
    requested = CosineRouter(
        CosineRouterConfig(experts=gate.config.experts, target_active=mean, sdl_weight=1.0), D, 0
    )
    requested.prototypes, requested.thresholds = gate.prototypes, gate.thresholds
    return requested(x).losses["sdl"]


def test_S1_diversity_of_orthonormal_and_of_equal_prototypes():
    gate = made(stirred=False)
    lost = diversity(gate)
    assert lost.detach().abs() < 1e-12
    lost.backward()
    assert gate.prototypes.grad.isfinite().all()
    with torch.no_grad():
        gate.prototypes.copy_(draw(1, D).expand(E, D))
    torch.testing.assert_close(diversity(gate).detach(), torch.ones(()).double())


def test_S1_diversity_does_not_depend_on_lengths():
    gate = made()
    before = diversity(gate).detach()
    with torch.no_grad():
        gate.prototypes *= torch.logspace(-2, 2, E)[:, None]
    torch.testing.assert_close(diversity(gate).detach(), before)


@pytest.mark.parametrize(("experts", "bound"), [(32, 0.03226), (64, 0.04762)])
def test_S2_optimised_diversity_attains_the_welch_bound(experts, bound):
    gate = made(experts=experts, sdl_weight=1.0)
    optimizer = torch.optim.Adam([gate.prototypes], lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        lost = diversity(gate)
        lost.backward()
        optimizer.step()
    assert (experts / D - 1) / (experts - 1) == pytest.approx(bound, abs=1e-5)
    lost = float(lost.detach())
    assert lost >= bound - 1e-5
    assert lost == pytest.approx(bound, abs=1e-4)


@pytest.mark.parametrize(("target", "sign"), [(1.0, -1), (7.5, 1)])
def test_S3_thresholds_rise_with_too_many_active_experts_and_fall_with_too_few(target, sign):
    gate, x = made(target_active=target), draw(N, D)
    assert 1 < gate(x).mask_NE.sum(-1).double().mean() < 7.5
    gate(x).losses["sdl"].backward()
    assert (gate.thresholds.grad * sign > 0).all()


def test_S4_the_loss_reaches_prototypes_and_thresholds_only():
    gate, x = made(), draw(N, D).requires_grad_()
    gate(x).losses["sdl"].backward()
    assert x.grad is None
    for parameter in (gate.prototypes, gate.thresholds):
        assert (parameter.grad.reshape(E, -1) != 0).any(-1).all()


def test_S5_the_gradient_of_sparsity_is_that_of_its_surrogate():
    """Finite differences of the mean of sigmoids, times the outer slope at the hard mean."""
    target = 3.0
    gate, x = made(target_active=target, sdl_weight=1.0), draw(N, D)
    gate(x).losses["sdl"].backward()
    found = gate.thresholds.grad
    mean = gate(x).stats["load"].sum() / N
    for expert in range(E):
        sides = []
        for step in (1e-5, -1e-5):
            moved = gate.margins(x).detach()
            moved[:, expert] -= step
            sides.append((KAPPA * moved).sigmoid().sum() / N)
        slope = (sides[0] - sides[1]) / 2e-5
        expected = 2 * (mean - target) / target**2 * slope
        torch.testing.assert_close(found[expert], expected, rtol=1e-7, atol=1e-9)


def test_the_original_loss_is_diversity_plus_simplicity():
    gate, x = made(sdl="dynmoe", sdl_weight=1.0), draw(N, D)
    p = gate.prototypes.detach()
    unit = p / p.norm(dim=1, keepdim=True)
    expected = (unit @ unit.T - torch.eye(E)).norm() + p.norm(dim=1).mean() / math.sqrt(D)
    torch.testing.assert_close(gate(x).losses["sdl"].detach(), expected)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"experts": 0}, "experts=0 must be at least 1"),
        ({"target_active": 9}, "target_active=9.0 must be above 0 and at most experts=8"),
        ({"target_active": 0}, "target_active=0.0 must be above 0"),
        ({"sdl_weight": -1}, "sdl_weight=-1.0 must be at least 0"),
        ({"reset_interval": 0}, "reset_interval=0 must be at least 1, or null"),
    ],
)
def test_invalid_keys_are_refused(keys, message):
    with pytest.raises(Exception, match=message):
        parse(CosineRouterConfig, {"experts": E} | keys, "gate")

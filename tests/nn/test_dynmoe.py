"""Feed-forward with a variable number of experts against all experts run on all tokens."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from tests.oracles.surprise import causal_loss, dense, output
from tinsmith.nn.contract import BuildContext, Ctx, Out
from tinsmith.nn.feedforwards.dynmoe import DynMoE, DynMoEFeedForward
from tinsmith.nn.layers.linear import init_weights
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.optim.build import Optimizers
from tinsmith.optim.config import AdamWConfig, MuonConfig, OptimConfig

N, E, D = 24, 6, 8


def made(**keys) -> DynMoEFeedForward:
    torch.manual_seed(0)
    keys = {"experts": E, "hidden_dim": 5, "sdl_weight": 0.0} | keys
    feed = DynMoE(**keys).build(BuildContext(dim=D, layer_idx=0, depth=1))
    init_weights(feed, 1)
    with torch.no_grad():
        for stack in feed.experts.parameters():
            stack *= 2
        torch.manual_seed(1)
        feed.gate.prototypes += 0.1 * torch.randn(E, D)
        feed.gate.thresholds += 0.1 * torch.randn(E) + 0.2
    return feed.double()


def tokens(seed: int = 1) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=made, dtype=torch.float64)


def run(feed: DynMoEFeedForward, x: torch.Tensor, segments: torch.Tensor | None = None) -> Out:
    positions = torch.arange(len(x))[None]
    return feed(x[None], Ctx(positions, None if segments is None else segments[None]))


def by_hand(feed: DynMoEFeedForward, x: torch.Tensor) -> torch.Tensor:
    """The whole layer, dense: cosines, hard decisions with a sigmoid's slope, fallback, sums."""
    config, gate = feed.config, feed.gate
    u = F.cosine_similarity(x[:, None], gate.prototypes[None], dim=-1) - gate.thresholds
    mask = u > 0
    if config.fallback == "top1":
        for t in range(len(x)):
            if not mask[t].any():
                mask[t, u[t].argmax()] = True
    soft = (4 * u).sigmoid()
    value = mask.double() - soft.detach() + soft
    k = mask.sum(-1, keepdim=True).clamp(min=1)
    factor = {"mean": 1 / k.double(), "sum": 1.0, "rescaled_sum": E / k.double()}[config.combine]
    weights = {name: stack.weight[None] for name, stack in feed.experts.named_children()}
    return dense(x, weights, value * factor, mask)


@pytest.mark.parametrize(
    ("combine", "activation", "fallback"),
    product(["mean", "sum", "rescaled_sum"], ["swiglu", "relu2"], ["top1", "none"]),
)
def test_G5_dispatch_is_the_dense_masked_sum(combine, activation, fallback):
    keys = {"combine": combine, "activation": activation, "fallback": fallback}
    sparse, full = made(**keys), made(**keys)
    x, y = tokens().requires_grad_(), tokens().requires_grad_()
    out, expected = run(sparse, x), by_hand(full, y)
    assert out.stats["fallback"] > 0
    torch.testing.assert_close(out.y[0], expected, rtol=1e-12, atol=1e-12)
    causal_loss(out.y[0]).backward()
    causal_loss(expected).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)
    for (name, one), other in zip(sparse.named_parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12, msg=name)
        assert one.grad.abs().max() > 1e-6, name


def test_G3_the_routers_gradient_is_each_experts_effect_on_the_loss():
    """dL/du_te = <g_t, y_te> / k_t  kappa s (1 - s), summed over tokens for G, with a minus."""
    feed, x = made(), tokens()
    out = run(feed, x)
    out.y.retain_grad()
    causal_loss(out.y[0]).backward()
    g, choice, u = out.y.grad[0], feed.gate(x), feed.gate.margins(x)
    weights = {name: stack.weight[None] for name, stack in feed.experts.named_children()}
    along = torch.einsum("nd,ned->ne", g, output(x, weights))
    soft = (4 * u).sigmoid()
    k = choice.mask_NE.sum(-1, keepdim=True)
    slope = (along / k * 4 * soft * (1 - soft)).where(choice.mask_NE, 0)
    torch.testing.assert_close(feed.gate.thresholds.grad, -slope.sum(0), rtol=1e-11, atol=1e-13)


def test_G4_an_expert_that_is_never_selected_has_no_task_gradient():
    feed, x = made(fallback="none"), tokens()
    with torch.no_grad():
        feed.gate.thresholds[2] = 2.0
    causal_loss(run(feed, x).y[0]).backward()
    for name, parameter in feed.named_parameters():
        assert (parameter.grad[2] == 0).all(), name
        assert (parameter.grad[:2] != 0).any(), name


def test_G8_padding_is_neither_routed_nor_counted():
    feed, x = made(), tokens()
    segments = torch.where(torch.arange(N) % 4 == 1, -1, 0)
    found, alone = run(feed, x, segments), run(feed, x[segments >= 0])
    torch.testing.assert_close(found.y[0, segments >= 0], alone.y[0])
    assert (found.y[0, segments < 0] == 0).all()
    torch.testing.assert_close(found.stats, alone.stats)


@pytest.mark.parametrize("router_grad", ["task", "smk", "sml", "both"])
@pytest.mark.parametrize("fallback", ["top1", "none"])
def test_thresholds_that_deselect_every_expert_are_reported_without_nan(router_grad, fallback):
    feed = made(router_grad=router_grad, fallback=fallback, sdl_weight=10.0)
    with torch.no_grad():
        feed.gate.thresholds.fill_(2.0)
    out = run(feed, tokens().requires_grad_())
    (causal_loss(out.y[0]) + sum(out.losses.values())).backward()
    feed.after_backward(out.grad_probes)
    assert out.stats["fallback"] == N
    assert (out.stats["load"] == 0).all()
    assert out.y.isfinite().all()
    assert bool((out.y == 0).all()) == (fallback == "none")
    assert all(p.grad is None or p.grad.isfinite().all() for p in feed.parameters())
    assert (feed.gate.thresholds.grad > 0).all()  # SDL asks for more experts


def test_a_batch_of_padding_gives_zero_and_not_nan():
    feed = made(router_grad="smk", sdl_weight=0.01)
    out = run(feed, tokens(), torch.full((N,), -1))
    (out.y.sum() + sum(out.losses.values())).backward()
    stats = feed.after_backward(out.grad_probes)
    assert (out.y == 0).all()
    for value in (*out.losses.values(), *out.stats.values(), *stats.values()):
        assert value.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in feed.parameters())


def test_flops_and_inactive_parameters_use_the_target_number_of_experts():
    feed = made(target_active=2)
    assert feed.flops() == 2 * E * D + 2 * 6 * D * 5
    assert feed.inactive_parameters() == 3 * D * 5 * 4


def optimizers(feed: DynMoEFeedForward, kind: str) -> Optimizers:
    matrices = MuonConfig() if kind == "muon" else AdamWConfig()
    return Optimizers.build(feed, None, OptimConfig(matrices=matrices))


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_R1_optimizer_state_is_reset_exactly_for_dead_experts(kind):
    feed = made(reset_interval=2, sdl_weight=0.01)
    with torch.no_grad():
        feed.gate.thresholds[4] = 2.0
    chosen = optimizers(feed, kind)
    for seed in range(2):
        out = run(feed, tokens(seed))
        (causal_loss(out.y[0]) + sum(out.losses.values())).backward()
        chosen.step()
        before = {name: value.clone() for name, value in chosen.state_tensors().items()}
        weights = {name: value.detach().clone() for name, value in feed.named_parameters()}
        resets = feed.post_step(out.stats)
        chosen.reset_state(resets)
        chosen.zero_grad()
    assert {id(reset.parameter) for reset in resets} == {id(p) for p in feed.parameters()}
    after = chosen.state_tensors()
    for name, value in after.items():
        if name.endswith("|step"):
            assert torch.equal(value, before[name])
            continue
        assert (value[4] == 0).all(), name
        rest = [row for row in range(E) if row != 4]
        assert torch.equal(value[rest], before[name][rest]), name
        assert (value[rest] != 0).any(), name
    assert any((before[name][4] != 0).any() for name in before if not name.endswith("|step"))
    for name, value in feed.named_parameters():
        assert (value[4] != weights[name][4]).any(), name


def test_R5_tokens_with_experts_are_not_changed_by_a_reset():
    feed = made(reset_interval=1, combine="sum")
    with torch.no_grad():
        feed.gate.thresholds[4] = 2.0
    x = tokens()
    before = run(feed, x)
    mask = feed.gate(x).mask_NE
    routed = (feed.gate.margins(x) > 0).any(-1)
    assert 0 < routed.sum() < N
    resets = feed.post_step(before.stats)
    assert resets[0].rows.tolist() == [4]
    after = run(feed, x)
    assert not mask[:, 4].any()
    assert feed.gate(x).mask_NE[:, 4].any()
    torch.testing.assert_close(after.y[0, routed], before.y[0, routed], rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("router_grad", ["task", "smk"])
def test_training_on_random_tokens_stays_at_ln_V(router_grad):
    """Random tokens cannot be predicted; a lower loss would be a leak."""
    torch.manual_seed(0)
    feed = {"kind": "dyn_moe", "experts": 8, "hidden_dim": 16, "router_grad": router_grad}
    layer = {"mixer": {"kind": "gqa", "heads": 2}, "feed_forward": feed | {"reset_interval": 10}}
    section = {"vocab_size": 32, "dim": 32, "depth": 2, "max_seq_len": 64, "pattern": [layer]}
    lm = LM(ModelConfig.from_dict(section)).train()
    chosen = Optimizers.build(lm, None, OptimConfig())
    losses = []
    for _ in range(60):
        ids = torch.randint(0, 32, (8, 33))
        out = lm(ids[:, :-1])
        loss = F.cross_entropy(out.logits.flatten(0, 1), ids[:, 1:].flatten())
        (loss + sum(out.losses.values())).backward()
        lm.after_backward(out.grad_probes)
        chosen.step()
        chosen.reset_state(lm.post_step(out.stats))
        chosen.zero_grad()
        losses.append(loss.item())
    assert min(losses) > math.log(32) - 0.05
    assert losses[-1] < math.log(32) + 0.2

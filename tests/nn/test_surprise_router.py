"""Routers trained by surprise, SMK and SML (promises M6, M8, M10, M12)."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.oracles.surprise import causal_loss, output
from tinsmith.core.errors import UserError
from tinsmith.core.parse import parse
from tinsmith.nn.contract import BuildContext, Ctx, Out
from tinsmith.nn.feedforwards.dynmoe import DynMoE, DynMoEFeedForward
from tinsmith.nn.layers.linear import init_weights
from tinsmith.nn.moe.surprise import collect_probes
from tinsmith.nn.moe.surprise_router import TEMPERATURE, smk, sml, weighted_median

N, E, D = 14, 5, 8


def made(width: int = D, **keys) -> DynMoEFeedForward:
    torch.manual_seed(0)
    keys = {
        "experts": E,
        "hidden_dim": 6,
        "router_grad": "smk",
        "inactive_expert_guard": False,
    } | keys
    feed = DynMoE(**keys).build(BuildContext(dim=width, layer_idx=0, depth=1))
    init_weights(feed, 1)
    with torch.no_grad():
        for stack in feed.experts.parameters():
            stack *= 3
        feed.gate.prototypes += 0.1 * torch.randn_like(feed.gate.prototypes)
    return feed.double()


def tokens(count: int = N, seed: int = 1) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(count, D, generator=made, dtype=torch.float64)


def run(feed: DynMoEFeedForward, x: torch.Tensor) -> Out:
    return feed(x[None], Ctx(torch.arange(len(x))[None]))


def step(feed: DynMoEFeedForward, x: torch.Tensor, scale: float = 1.0) -> tuple[Out, dict]:
    """One backward pass of loss and SDL, times `scale`, and the router's own."""
    out = run(feed, x)
    (scale * (causal_loss(out.y[0]) + sum(out.losses.values()))).backward()
    return out, feed.after_backward(out.grad_probes)


def gradients(feed: DynMoEFeedForward) -> dict[str, torch.Tensor]:
    return {name: value.grad for name, value in feed.named_parameters() if value.grad is not None}


def by_hand(feed: DynMoEFeedForward, x, surprise, known, loss: str) -> torch.Tensor:
    """The router's loss, token by token."""
    logits = feed.gate.margins(x.detach()) / TEMPERATURE
    lost = []
    for t in range(len(x)):
        chosen = known[t].nonzero().flatten()
        if len(chosen) < 2:
            continue
        s, r = surprise[t, chosen].detach(), logits[t, chosen]
        relative = s / s.mean()
        if loss == "hard":
            lost.append(F.cross_entropy(r[None], s.argmin()[None]))
        elif loss == "soft":
            lost.append(-((-relative / 0.2).softmax(0) * r.log_softmax(0)).sum())
        else:
            lost.append((r.softmax(0) * relative).sum())
    return torch.stack(lost).mean()


LOSSES = {
    "hard": {"router_grad": "smk"},
    "soft": {"router_grad": "smk", "smk_target": "soft"},
    "sml": {"router_grad": "sml"},
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("guard", [False, True])
def test_M6_a_joint_step_equals_two_separate_steps(loss, guard):
    """The main loss gives the gate nothing, the router's loss gives experts and x nothing, and
    together they are the sum of both.
    """
    keys = LOSSES[loss] | {"inactive_expert_guard": guard, "router_weight": 0.7}
    feed, x = made(**keys), tokens().requires_grad_()
    out = run(feed, x)
    causal_loss(out.y[0]).backward(retain_graph=True)
    main = gradients(feed)
    assert not any(name.startswith("gate") for name in main)
    main_x = x.grad.clone()

    twin, y = made(**keys), tokens().requires_grad_()
    out, stats = step(twin, y)
    found = collect_probes(out.grad_probes)
    known = found.active_NE
    if guard:
        sizes = sorted(found.output_norm_NE[known].tolist())
        usual = next(s for n, s in enumerate(sizes) if sum(sizes[: n + 1]) >= sum(sizes) / 2)
        known = known & (found.output_norm_NE > 0.1 * usual)
        assert known.sum() < found.active_NE.sum()
    lone = made(**keys)
    router = by_hand(lone, tokens(), found.surprise_NE, known, loss)
    (0.7 * router + run(lone, tokens()).losses["sdl"]).backward()
    separate = gradients(lone)
    assert set(separate) == {"gate.prototypes", "gate.thresholds"}
    assert torch.equal(y.grad, main_x)
    joint = gradients(twin)
    for name, value in (main | separate).items():
        torch.testing.assert_close(joint[name], value, rtol=1e-10, atol=1e-12, msg=name)
    assert set(joint) == set(main | separate)
    scored = (known.sum(-1) > 1).sum()
    assert stats["router_tokens"] == scored
    torch.testing.assert_close(stats["router_loss"], router.detach() * scored)


def test_M6_both_is_task_and_smk():
    """The router gets the gradients of the task loss and of SMK."""
    grads = {}
    for kind in ("task", "smk", "both"):
        feed = made(router_grad=kind, sdl_weight=0.0)
        step(feed, tokens())
        grads[kind] = gradients(feed)
    for name in grads["task"]:
        own = grads["smk"][name] if name.startswith("gate") else 0
        torch.testing.assert_close(grads["both"][name], grads["task"][name] + own)
    assert (grads["task"]["gate.thresholds"] != 0).any()


def test_the_gradient_scales_with_the_trainer_s_factor():
    """Loss scaling, accumulation and ranks multiply the loss: the router's follows."""
    grads = []
    for scale in (1.0, 4096.0):
        feed = made()
        step(feed, tokens(), scale)
        grads.append(gradients(feed))
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], 4096 * value, rtol=1e-9, atol=1e-12)


def test_losses_equal_their_definitions():
    surprise = torch.tensor([[3.0, 1.0, 2.0], [5.0, 9.0, 7.0], [1.0, 1.0, 1.0]]).double()
    known = torch.tensor([[True, True, True], [False, True, True], [False, False, False]])
    logits = torch.tensor([[0.1, 0.2, 0.3], [9.0, 0.5, 0.4], [1.0, 2.0, 3.0]]).double()
    logits.requires_grad_()
    first, second = logits[0].log_softmax(0), logits[1, 1:].log_softmax(0)
    torch.testing.assert_close(smk(logits, surprise, known), -(first[1] + second[1]) / 2)
    expected = (
        (first.exp() * surprise[0] / 2).sum() + (second.exp() * surprise[1, 1:] / 8).sum()
    ) / 2
    torch.testing.assert_close(sml(logits, surprise, known), expected)
    for lost in (smk(logits, surprise, known), smk(logits, surprise, known, True)):
        (slope,) = torch.autograd.grad(lost, logits)
        torch.testing.assert_close(slope.sum(-1), torch.zeros(3).double())
        assert (slope[~known] == 0).all()
    q = (-surprise[0] / 2 / 0.2).softmax(0)
    (slope,) = torch.autograd.grad(smk(logits, surprise, known, True), logits)
    torch.testing.assert_close(slope[0], (first.exp().detach() - q) / 2)


def test_ties_go_to_the_smaller_index_and_no_candidates_give_zero_loss():
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    equal = torch.full((1, 3), 0.3, dtype=torch.float64) + torch.tensor([1e-15, 0, -1e-15])
    everyone = torch.ones(1, 3, dtype=torch.bool)
    (slope,) = torch.autograd.grad(smk(logits, equal, everyone), logits)
    torch.testing.assert_close(slope[0], torch.tensor([-2 / 3, 1 / 3, 1 / 3]).double())
    for surprise in (equal, torch.zeros_like(equal)):
        for lost in (
            smk(logits, surprise, ~everyone),
            smk(logits, surprise, ~everyone, soft=True),
            sml(logits, surprise, ~everyone),
        ):
            assert lost == 0
            assert (torch.autograd.grad(lost, logits)[0] == 0).all()
    assert smk(logits, torch.zeros_like(equal), everyone, soft=True).isfinite()


def planted(loss: str) -> float:
    """Two clusters of tokens, two experts; each changes little for a cluster of its own. The share
    of tokens whose logits prefer that expert after training the gate alone.
    """
    feed = made(experts=2, **LOSSES[loss], sdl_weight=0.0, combine="sum")
    mark = torch.zeros(2, D, dtype=torch.float64)
    mark[0, 0], mark[1, 1] = 3.0, 3.0
    with torch.no_grad():
        # expert e hardly answers to the mark of cluster e: small h, small da and db
        for stack in (feed.experts.gate_proj.weight, feed.experts.up_proj.weight):
            for expert in (0, 1):
                stack[expert, :, expert] *= 0.01
                stack[expert, :, 2:] *= 0.1
        feed.gate.prototypes.copy_(mark.sum(0).expand(2, D))
        feed.gate.thresholds.fill_(-2.0)  # both always work, so both are candidates
    optimizer = torch.optim.Adam(feed.gate.parameters(), lr=0.05)
    cluster = torch.arange(64) % 2

    def share() -> float:
        preferred = feed.gate.margins(mark[cluster] + 0.3 * tokens(64, seed=99)).argmax(-1)
        return (preferred == cluster).double().mean().item()

    assert share() < 0.75
    for seed in range(100):
        x = mark[cluster] + 0.3 * tokens(64, seed=seed)
        optimizer.zero_grad()
        step(feed, x)
        optimizer.step()
    return share()


@pytest.mark.parametrize("loss", LOSSES)
def test_M8_the_router_finds_the_expert_that_would_change_least(loss):
    assert planted(loss) > 0.95


EVERYONE = [-2.0] * E
ROOMS = {
    "1 of 5": ([2], EVERYONE),
    "3 of 5": ([1, 2, 3], EVERYONE),
    "4 of 5": ([0, 1, 2, 3], EVERYONE),
    "1 of 2": ([2], [-2.0, 2.0, -2.0, 2.0, 2.0]),
    "2 of 3": ([2, 3], [-2.0, 2.0, -2.0, -2.0, 2.0]),
}
"""Indices of inactive experts, and thresholds for the number of active ones."""
rooms = pytest.mark.parametrize("room", ROOMS)
whispers = pytest.mark.parametrize("whisper", [0.0, 1e-3])
"""Scale of the inactive experts' first matrices; their outputs scale with its square."""


def dark(guard: bool, room: str, whisper: float, newborn: tuple[int, ...] = ()):
    """Experts that say next to nothing, among others: their share of all weight before and after
    SMK, the gate before and after, and the last report.
    """
    silent, thresholds = ROOMS[room]
    feed = made(inactive_expert_guard=guard, sdl_weight=0.0)
    with torch.no_grad():
        feed.experts.gate_proj.weight[silent] *= whisper
        feed.experts.up_proj.weight[silent] *= whisper
        feed.experts.down_proj.weight[list(newborn)] = 0
        feed.gate.window.newborn[list(newborn)] = True
        feed.gate.thresholds.copy_(torch.tensor(thresholds))
    before = feed.gate.prototypes.detach().clone()
    optimizer = torch.optim.SGD(feed.gate.parameters(), lr=0.3)
    active = [e for e in range(E) if thresholds[e] < 0 and e not in newborn]
    shares, stats = [], {}
    for seed in range(40):
        optimizer.zero_grad()
        _, stats = step(feed, tokens(32, seed))
        logits = (feed.gate.margins(tokens(64, seed=99)) / TEMPERATURE).detach()
        won = logits[:, active].softmax(-1).mean(0)
        shares.append(sum(won[active.index(e)].item() for e in silent))
        optimizer.step()
    moved = (feed.gate.prototypes.detach() != before).any(-1)
    return shares[0], shares[-1], moved[silent], stats


@rooms
@whispers
def test_M10_inactive_experts_win_every_token_without_the_guard(room, whisper):
    first, last, moved, stats = dark(False, room, whisper)
    assert stats["inactive_fraction"] == stats["compared"] > 0
    assert last > 0.95
    assert last > first
    assert moved.any()


@rooms
@whispers
def test_M10_the_guard_excludes_and_reports_them(room, whisper):
    first, last, moved, stats = dark(True, room, whisper)
    assert stats["inactive_fraction"] == stats["compared"] == 32
    assert last < first + 0.05
    assert not moved.any()
    assert DynMoE(experts=2, hidden_dim=2).inactive_expert_guard


@pytest.mark.parametrize("guard", [False, True])
def test_M10_reset_experts_do_not_lower_the_usual_norm(guard):
    """Three say nothing yet, beside one that never will and one that speaks."""
    first, last, moved, stats = dark(guard, "1 of 5", 0.0, newborn=(0, 1, 3))
    assert stats["inactive_fraction"] == stats["compared"] > 0
    assert bool(moved.any()) is not guard
    assert last <= first if guard else last > 0.95


def test_M10_where_all_are_inactive_none_is_preferred():
    feed = made(inactive_expert_guard=True)
    with torch.no_grad():
        feed.experts.down_proj.weight.zero_()
    _, stats = step(feed, tokens())
    assert stats["router_tokens"] == 0
    assert stats["inactive_fraction"] == stats["compared"] > 0


def test_the_usual_norm_is_the_weighted_median():
    def of(*sizes: float) -> float:
        return weighted_median(torch.tensor(sizes).double()).item()

    assert of(3.0) == 3
    assert of(1, 1, 1, 1, 1) == 1
    assert of(2, 0, 0, 1, 0, 0, 2) == 2
    assert of(*[1e-3] * 400, 1, 1) == 1  # the many say 0.4, the two say 2
    assert of(*[1.0] * 99, 50) == 1  # one large norm does not make the others inactive
    assert of(0, 0) == of() == 0
    torch.manual_seed(0)
    sizes = torch.rand(1001).double()
    above = sizes[sizes >= weighted_median(sizes)].sum() / sizes.sum()
    assert 0.5 <= above < 0.502


def test_statistics_equal_their_definitions():
    feed = made()
    out, stats = step(feed, tokens())
    found = collect_probes(out.grad_probes)
    active = found.active_NE
    s, size = found.surprise_NE[active], found.output_norm_NE[active]
    assert stats["pairs"] == active.sum()
    relative = found.surprise_NE / found.grad_norm_N[:, None]
    torch.testing.assert_close(stats["surprise"], relative[active].sum())
    compared = (active.sum(-1) > 1).sum()
    assert stats["compared"] == compared
    alike = torch.corrcoef(torch.stack((s, size)))[0, 1]
    torch.testing.assert_close(stats["surprise_norm_corr"], alike * compared)
    assert stats["inactive_fraction"] == 0


def test_surprise_divided_by_the_gradient_is_scale_free():
    reports = [step(made(), tokens(), scale)[1] for scale in (1.0, 1000.0)]
    for name in ("surprise", "surprise_norm_corr", "router_loss"):
        torch.testing.assert_close(reports[0][name], reports[1][name])


def test_reset_experts_are_no_candidates():
    feed = made()
    with torch.no_grad():
        feed.gate.window.newborn[1] = True
    out, stats = step(feed, tokens())
    found = collect_probes(out.grad_probes)
    known = found.active_NE.clone()
    known[:, 1] = False
    assert found.active_NE[:, 1].any()
    expected = by_hand(feed, tokens(), found.surprise_NE, known, "hard").detach()
    torch.testing.assert_close(stats["router_loss"] / stats["router_tokens"], expected)


@pytest.mark.parametrize("candidates", ["all", "active+r"])
def test_reset_experts_are_no_extra_candidates(candidates):
    feed = made(candidates=candidates)
    with torch.no_grad():
        feed.gate.window.newborn[1] = True
    out, stats = step(feed, tokens())
    active = collect_probes(out.grad_probes).active_NE
    assert active[:, 1].any()
    assert not active[:, 1].all()
    old = active.sum(-1) - active[:, 1].long()
    requested = (E - 1) * N if candidates == "all" else (old + 1).clamp(max=E - 1).sum()
    assert stats["pairs"] == requested


@pytest.mark.parametrize("candidates", ["all", "active+r"])
def test_surprise_of_extra_candidates_equals_autograd(candidates):
    """With g held fixed, by autograd with the expert's own weights."""
    feed = made(candidates=candidates, extra_candidates=2)
    torch.manual_seed(5)
    out, stats = step(feed, tokens())
    found = collect_probes(out.grad_probes)
    counts = found.active_NE.sum(-1)
    requested = E * N if candidates == "all" else int((counts + 2).clamp(max=E).sum())
    assert stats["pairs"] == requested
    if candidates == "all":
        shared = {
            name: stack.weight.detach()[None] for name, stack in feed.experts.named_children()
        }
        surprise = torch.zeros(N, E, dtype=torch.float64)
        for t in range(N):
            own = {name: value.clone().requires_grad_() for name, value in shared.items()}
            for e in range(E):
                generated = (output(tokens()[t : t + 1], own)[0, e] * found.output_grad_ND[t]).sum()
                grads = torch.autograd.grad(generated, list(own.values()))
                surprise[t, e] = torch.cat([g.flatten() for g in grads]).norm()
        everyone = torch.ones(N, E, dtype=torch.bool)
        expected = by_hand(feed, tokens(), surprise, everyone, "hard").detach()
        torch.testing.assert_close(stats["router_loss"] / N, expected, rtol=1e-12, atol=0)


def test_M12_sml_local_is_the_double_backward_of_the_explicit_norm():
    """d/dW of mean_t sum_e pi_te |dL_t/dW_e| / mean S, with g, pi and mean S held fixed."""
    keys = {"router_grad": "sml", "sdl_weight": 0.0, "router_weight": 0.7}
    plain, local, x = made(**keys), made(**keys, sml_local=True), tokens()
    out, _ = step(local, x)
    step(plain, x)
    found = collect_probes(out.grad_probes)
    known = found.active_NE & (found.active_NE.sum(-1, keepdim=True) > 1)
    weights = {
        n: s.weight.detach()[None].requires_grad_() for n, s in local.experts.named_children()
    }
    logits = (local.gate.margins(x) / TEMPERATURE).detach()
    lost = 0.0
    for t in range(N):
        chosen = known[t].nonzero().flatten().tolist()
        if not chosen:
            continue
        y = output(x[t : t + 1], weights)[0]
        norms = []
        for e in chosen:
            generated = (y[e] * found.output_grad_ND[t]).sum()
            grads = torch.autograd.grad(generated, list(weights.values()), create_graph=True)
            norms.append(sum(g.square().sum() for g in grads).sqrt())
        s = torch.stack(norms)
        lost = lost + (logits[t, chosen].softmax(0) * s / s.detach().mean()).sum()
    lost = 0.7 * lost / known.any(-1).sum()
    expected = torch.autograd.grad(lost, list(weights.values()))
    before, after = gradients(plain), gradients(local)
    for name, value in zip(weights, expected, strict=True):
        key = f"experts.{name}.weight"
        torch.testing.assert_close(after[key] - before[key], value[0], rtol=1e-10, atol=1e-12)
    for name in ("gate.prototypes", "gate.thresholds"):
        assert torch.equal(before[name], after[name])


class Sizes(TorchDispatchMode):
    """Of everything that is made inside."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        sizes = [each.numel() for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return made


WAYS = LOSSES | {
    "both": {"router_grad": "both"},
    "others": {"router_grad": "smk", "candidates": "active+r"},
    "local": {"router_grad": "sml", "sml_local": True, "candidates": "all"},
}
every_way = pytest.mark.parametrize("way", WAYS)


@every_way
def test_no_weights_per_token_are_created(way):
    """An expert has 3 x 6 x 8 numbers; of a pair of token and expert there are never more than 8,
    neither in what waits for the backward pass nor on the way.
    """
    kept, count = [], 32

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    feed, sizes = made(**WAYS[way]), Sizes()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), sizes:
        step(feed, tokens(count))
    assert max(kept) <= sizes.largest <= count * E * D
    assert sizes.largest < count * 3 * 6 * D / 3


@every_way
def test_one_backward_pass_is_enough(way, monkeypatch):
    """The graph of the losses is freed by it before the router learns, and none is built of
    gradients.
    """
    flags, grad = [], torch.autograd.grad

    def watched(*arguments, **named):
        flags.append(named.get("create_graph", False) or named.get("retain_graph", False))
        return grad(*arguments, **named)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    feed = made(**WAYS[way])
    out = run(feed, tokens())
    (causal_loss(out.y[0]) + sum(out.losses.values())).backward()
    stats = feed.after_backward(out.grad_probes)
    assert stats["router_tokens"] > 0
    assert flags == [False] * (2 if way == "local" else 1)
    held = [*gradients(feed).values(), *stats.values()]
    held += [
        probe.grad for probe in out.grad_probes.values() if probe.is_leaf and probe.requires_grad
    ]
    assert not any(tensor.requires_grad for tensor in held)
    with pytest.raises(RuntimeError, match="second time"):
        out.y.sum().backward()


def test_without_enough_tokens_there_is_no_gradient_and_no_error():
    for fallback in ("top1", "none"):
        feed = made(fallback=fallback, sdl_weight=0.0)
        with torch.no_grad():
            feed.gate.thresholds.fill_(2.0)
        out, stats = step(feed, tokens())
        assert stats["router_tokens"] == 0
        assert out.y.isfinite().all()
        assert all((value == 0).all() for n, value in gradients(feed).items() if "gate" in n[:5])
        assert all(value.isfinite().all() for value in stats.values())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"router_weight": -1}, "router_weight=-1.0 must be at least 0"),
        ({"extra_candidates": 0}, "extra_candidates=0 must be at least 1"),
        ({"sml_local": True}, "sml_local=true needs router_grad=sml"),
        ({"smk_target": "soft"}, "smk_target=soft needs router_grad=smk or both"),
        ({"smk_target": "soft", "router_grad": "sml"}, "smk_target=soft needs"),
        ({"candidates": "all"}, "candidates=all needs router_grad=smk, sml or both"),
        (
            {"experts": 1, "router_grad": "smk"},
            "router_grad=smk compares experts, so experts=1 is too few",
        ),
        ({"router_grad": "tsk"}, "router_grad"),
        ({"hidden_dim": 0}, "hidden_dim=0 must be at least 1"),
        ({"experts": 0}, "experts=0 must be at least 1"),
        ({"target_active": 33}, "target_active=33.0 must be above 0 and at most experts=32"),
    ],
)
def test_invalid_keys_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        parse(DynMoE, {"kind": "dyn_moe", "experts": 32, "hidden_dim": 96} | keys, "feed_forward")

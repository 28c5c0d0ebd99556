"""Mixers whose projections are experts: dyn_heads (promises A) and dyn_lora (promises L)."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.oracles.close import close_to
from tinsmith.nn.attention.rope import Rope, rotary_tables
from tinsmith.nn.contract import BuildContext, Ctx
from tinsmith.nn.mixers.dynheads import DynHeads
from tinsmith.nn.mixers.dynlora import DynLoRA
from tinsmith.nn.mixers.gqa import GQA

close = close_to(1e-12)

D, T, E = 24, 11, 3
HEADS = {"heads": 3, "kv_heads": 1, "head_dim": 8}
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
ALWAYS, NEVER = -2.0, 2.0
"""Thresholds that every cosine exceeds, or none."""


def made(config, stirred=True):
    torch.manual_seed(0)
    mixer = config.build(BuildContext(D, 0, 2)).double()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if stirred or name.endswith("proj.weight"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
        mixer.gate.thresholds.copy_(0.05 * torch.randn(mixer.gate.config.experts))
    return mixer


def heads(**keys):
    return made(DynHeads(**({"experts": E} | HEADS | keys)))


def lora(stirred=True, base=None, **keys):
    section = {"experts": E, "rank": 2, "base": GQA(**HEADS, **(base or {}))} | keys
    return made(DynLoRA(**section), stirred)


MIXERS = {"dyn_heads": heads, "dyn_lora": lora}


@pytest.fixture(params=MIXERS)
def mixer(request):
    return MIXERS[request.param]()


def context(rows=2, segments=None, start=0, count=T):
    positions = torch.arange(start, start + count).expand(rows, -1)
    return Ctx(positions, segments, None, {8: rotary_tables(Rope(), 8, positions, torch.float64)})


def noise(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def only(mixer, *experts):
    """Make every token select exactly these experts."""
    with torch.no_grad():
        mixer.gate.thresholds.fill_(NEVER)
        mixer.gate.thresholds[list(experts)] = ALWAYS


def plain(weights, **keys) -> torch.nn.Module:
    """A gqa with these four matrices."""
    mixer = GQA(**(HEADS | keys)).build(BuildContext(D, 0, 2)).double()
    for name, weight in zip(NAMES, weights, strict=True):
        mixer.get_parameter(f"{name}.weight").data.copy_(weight)
    return mixer


def stacked(mixer) -> list[Tensor]:
    return [mixer.get_parameter(f"{name}.weight") for name in NAMES]


def dense(mixer, x, ctx):
    """All experts on all tokens, masked afterwards, with explicit matrices."""
    choice = mixer.route(x, ctx)
    c = (choice.mask_NE * choice.weight_NE).unflatten(0, x.shape[:2])
    if isinstance(mixer.gate.config, DynHeads):
        base, matrices = mixer, [(None, weight) for weight in stacked(mixer)]
    else:
        base, deltas = mixer.base, [mixer.get_submodule(f"{name[0]}_delta") for name in NAMES]
        changes = [mixer.scale * (delta.up @ delta.down) for delta in deltas]
        matrices = list(zip((base.get_submodule(name) for name in NAMES), changes, strict=True))

    def project(x, static, experts):
        mixed = torch.einsum("bte,eoi,bti->bto", c, experts, x)
        return mixed if static is None else static(x) + mixed

    q, k, v = (project(x, *pair) for pair in matrices[:3])
    return project(base.attend(q, k, v, ctx, None).y, *matrices[3])


def gradients(mixer, y, x):
    parameters = list(mixer.parameters())
    found = torch.autograd.grad((y * noise(*y.shape, seed=3)).sum(), [x, *parameters])
    return dict(zip(["x", *(name for name, _ in mixer.named_parameters())], found, strict=True))


@pytest.mark.parametrize("combine", ["mean", "sum", "rescaled_sum"])
@pytest.mark.parametrize("kind", MIXERS)
def test_A5_the_dispatch_is_a_dense_masked_einsum_in_outputs_and_gradients(kind, combine):
    mixer = MIXERS[kind](combine=combine).eval()
    x, ctx = noise(2, T, D).requires_grad_(), context()
    counts = mixer.expert_mask(x, ctx).sum(-1)
    assert counts.unique().numel() > 1, "tokens differ in how many experts they want"
    found, expected = mixer(x, ctx).y, dense(mixer, x, ctx)
    close(found, expected)
    both = [gradients(mixer, y, x) for y in (found, expected)]
    for name in both[0]:
        largest = both[1][name].abs().max()
        assert largest > 0, name
        close(both[0][name] / largest, both[1][name] / largest)


def test_A1_no_token_attends_to_a_later_one(mixer):
    """To the last bits only: how many pairs an expert has depends on later tokens."""
    mixer.eval()
    x, ctx = noise(2, T, D), context()
    moved = x.clone()
    moved[:, 6] += 1.0
    found, other = mixer(x, ctx).y, mixer(moved, ctx).y
    close(found[:, :6], other[:, :6])
    assert ((found - other)[:, 6:].abs().amax(-1) > 1e-6).all()


def test_A2_L3_decoding_with_a_cache_is_the_full_forward(mixer):
    mixer.eval()
    x = noise(2, T, D)
    whole = mixer(x, context()).y
    cache = mixer.new_cache(2, T, torch.float64, torch.device("cpu"))
    parts = [mixer(x[:, :4], context(count=4), cache).y]
    for t in range(4, T):
        parts.append(mixer(x[:, t : t + 1], context(start=t, count=1), cache).y)
    close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("expert", range(E))
def test_A3_a_router_that_always_selects_one_expert_gives_ordinary_attention(expert):
    mixer, x = heads(), noise(2, T, D)
    only(mixer, expert)
    alone = plain([weight[expert] for weight in stacked(mixer)])
    close(mixer(x, context()).y, alone(x, context()).y)


@pytest.mark.parametrize("keys", [{}, {"window": 4, "qk_norm": True}, {"heads": 1}])
def test_A4_one_expert_is_ordinary_attention(keys):
    mixer, x = heads(experts=1, **keys), noise(2, T, D)
    only(mixer, 0)
    alone = plain([weight[0] for weight in stacked(mixer)], **keys)
    if "qk_norm" in keys:
        for name in ("q_norm.weight", "k_norm.weight"):
            alone.get_parameter(name).data.copy_(mixer.get_parameter(name))
    close(mixer(x, context()).y, alone(x, context()).y)


def test_A6_one_head_is_a_mixture_of_projections_into_it():
    """Tiny-ONN's own form: no matrix per token, the same numbers as with one."""
    mixer, x, ctx = heads(heads=1, rope=False), noise(1, 5, D), context(1, count=5)
    choice = mixer.route(x, ctx)
    c = choice.mask_NE * choice.weight_NE
    q, k, v, o = (torch.einsum("te,eoi->toi", c, weight) for weight in stacked(mixer))
    queries, keys, values = (torch.einsum("toi,ti->to", w, x[0]) for w in (q, k, v))
    scores = (queries @ keys.mT / 8**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    seen = scores.softmax(-1) @ values
    close(mixer(x, ctx).y[0], torch.einsum("toi,ti->to", o, seen))


def test_L1_at_initialisation_it_equals_its_base_to_the_bit():
    mixer, x = lora(stirred=False), noise(2, T, D)
    assert mixer.expert_mask(x, context()).any()
    with torch.no_grad():
        for delta in mixer.deltas:
            delta.up.zero_()
            assert delta.down.abs().min() > 0
    assert torch.equal(mixer(x, context()).y, mixer.base(x, context()).y)


def test_L1_low_rank_weights_have_their_initial_distribution():
    torch.manual_seed(0)
    delta = DynLoRA(experts=64, rank=16, base=GQA(heads=3)).build(BuildContext(D, 0, 2)).q_delta
    assert delta.down.std().item() == pytest.approx(D**-0.5, rel=0.05)
    assert not delta.up.any()


@pytest.mark.parametrize("experts", [[0], [0, 2], [0, 1, 2]])
def test_L2_a_constant_router_gives_the_base_with_merged_weights(experts):
    mixer, x = lora(alpha=3.0), noise(2, T, D)
    only(mixer, *experts)
    share = 3.0 / 2 / len(experts)
    merged = []
    for name in NAMES:
        delta = mixer.get_submodule(f"{name[0]}_delta")
        change = sum(delta.up[e] @ delta.down[e] for e in experts)
        merged.append(mixer.base.get_parameter(f"{name}.weight") + share * change)
    close(mixer(x, context()).y, plain(merged)(x, context()).y)


@pytest.mark.parametrize("experts", [(0,), (1, 3)])
def test_L4_a_token_is_changed_by_at_most_k_times_rank_directions(experts, monkeypatch):
    """The rank of x -> projection minus base, over more tokens than directions."""
    mixer, x = lora(rank=2, experts=4), noise(1, 4 * D, D)
    only(mixer, *experts)
    received = []
    look = mixer.base.attend
    monkeypatch.setattr(
        mixer.base, "attend", lambda *given: (received.extend(given[:3]), look(*given))[1]
    )
    mixer(x, context(1, count=4 * D))
    assert len(received) == 3
    for output, name in zip(received, NAMES, strict=False):
        beyond = output - mixer.base.get_submodule(name)(x)
        assert torch.linalg.matrix_rank(beyond[0], rtol=1e-9) == 2 * len(experts), name


def test_L5_with_a_zero_base_and_full_rank_it_is_dyn_heads():
    full, x = heads(fallback="none"), noise(2, T, D)
    mixer = lora(rank=D, alpha=float(D))
    mixer.gate.load_state_dict(full.gate.state_dict())
    with torch.no_grad():
        for name, weight in zip(NAMES, stacked(full), strict=True):
            mixer.base.get_parameter(f"{name}.weight").zero_()
            delta = mixer.get_submodule(f"{name[0]}_delta")
            delta.down.copy_(torch.eye(D).expand(E, -1, -1))
            delta.up.copy_(weight)
    close(mixer(x, context()).y, full(x, context()).y)


def test_L6_a_frozen_base_has_no_gradient():
    mixer = lora(freeze_base=True)
    mixer(noise(2, T, D), context()).y.square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert (parameter.grad is None) == name.startswith("base."), name
        assert parameter.requires_grad != name.startswith("base.")


def test_a_token_without_experts_uses_the_base_only():
    mixer, x = lora(), noise(2, T, D)
    only(mixer)
    close(mixer(x, context()).y, mixer.base(x, context()).y)
    assert DynLoRA(experts=2, base=GQA()).fallback == "none"


def test_with_fallback_none_tokens_without_experts_get_zero_and_no_nan():
    mixer, x = heads(fallback="none"), noise(2, T, D)
    only(mixer)
    y = mixer(x.requires_grad_(), context()).y
    assert not y.any()
    y.sum().backward()
    assert not x.grad.any()
    fallen = heads(fallback="top1")
    only(fallen)
    assert fallen.expert_mask(x, context()).sum(-1).eq(1).all()
    assert fallen(x, context()).y.abs().amin() > 0


def test_padding_is_never_routed_nor_counted(mixer):
    x, segments = noise(2, T, D), torch.zeros(2, T, dtype=torch.long)
    segments[:, :3] = -1
    ctx = context(segments=segments)
    chosen = mixer.expert_mask(x, ctx)
    assert not chosen[:, :3].any()
    assert chosen[:, 3:].any()
    stats = mixer(x, ctx).stats
    assert stats["tokens"] == 2 * (T - 3)
    other = x.clone()
    other[:, :3] = 50.0
    found = mixer(other, ctx)
    close(found.y[:, 3:], mixer(x, ctx).y[:, 3:])
    close(found.stats, stats)


def test_the_router_has_a_task_gradient(mixer):
    mixer(noise(2, T, D), context()).y.square().sum().backward()
    assert mixer.gate.prototypes.grad.abs().sum() > 0
    assert mixer.gate.thresholds.grad.abs().sum() > 0


def test_reported_routing_statistics_are_consistent(mixer):
    x, ctx = noise(2, T, D), context()
    out = mixer.train()(x, ctx)
    assert set(out.losses) == {"sdl"}
    fired = mixer.gate.margins(x.flatten(0, 1)) > 0
    assert torch.equal(out.stats["load"], fired.sum(0))
    assert torch.equal(mixer.router_state()["thresholds"], mixer.gate.thresholds)
    assert not mixer.eval()(x, ctx).losses


def test_recomputation_selects_the_same_experts(mixer):
    found = []
    for run in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        mixer.zero_grad()
        out = run(mixer, noise(2, T, D), context())
        out.y.square().sum().backward()
        found.append([out.y, out.stats, [parameter.grad for parameter in mixer.parameters()]])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("kind", MIXERS)
def test_a_dead_expert_is_reinitialised(kind):
    mixer = MIXERS[kind](reset_interval=2)
    only(mixer, 0, 2)
    x, ctx = noise(2, T, D), context()
    before = {name: value.detach().clone() for name, value in mixer.named_parameters()}
    assert mixer.post_step(mixer(x, ctx).stats) == []
    resets = mixer.post_step(mixer(x, ctx).stats)
    own = {name for name in before if not name.startswith("base.")}
    named = {id(value): name for name, value in mixer.named_parameters()}
    assert {named[id(reset.parameter)] for reset in resets} == own
    assert all(reset.rows.tolist() == [1] for reset in resets)
    for name, value in mixer.named_parameters():
        rest = [0, 2] if name in own else slice(None)
        assert torch.equal(value[rest], before[name][rest]), name
        assert name not in own or (value[1] != before[name][1]).any(), name
    writes = [mixer.o_proj.weight] if kind == "dyn_heads" else [mixer.o_delta.up, mixer.q_delta.up]
    assert not any(weight[1].any() for weight in writes)


def test_the_value_residual_is_that_of_the_base():
    config = DynLoRA(experts=2, base=GQA(heads=3, value_residual=True))
    assert config.value_residual_shape(D) == (3, 8)
    assert DynLoRA(experts=2, base=GQA(heads=3)).value_residual_shape(D) is None
    later = made(config)
    x, ctx = noise(2, T, D), context()
    offered = later(x, ctx).value_residual
    assert offered.shape == (2, T, 3, 8)
    assert not torch.equal(
        later(x, ctx._replace(value_residual=noise(2, T, 3, 8))).y, later(x, ctx).y
    )
    assert torch.equal(
        later(x, ctx._replace(value_residual=noise(2, T, 3, 8))).value_residual, offered
    )


def test_flops_are_counted_for_the_target_number_of_experts():
    gate = 2 * E * D
    alone = plain([torch.zeros(())] * 4)
    looking = alone.flops(T) - alone.projection_flops()
    assert heads(target_active=2.0).flops(T) == 2 * alone.projection_flops() + gate + looking
    change = 2 * 2 * (4 * D + 2 * 24 + 2 * 8)
    assert lora(target_active=1.5).flops(T) == alone.flops(T) + gate + int(1.5 * change)
    assert heads(target_active=2.0).inactive_parameters() == alone.projection_flops() // 2
    assert lora(target_active=1.5).inactive_parameters() == 1.5 * change // 2


@pytest.mark.parametrize(
    ("kind", "keys", "output"),
    [
        (DynHeads, {"experts": 0}, "experts=0"),
        (DynHeads, {"experts": 2, "heads": 3, "kv_heads": 2}, "multiple of kv_heads"),
        (DynHeads, {"experts": 2, "target_active": 3.0}, "target_active=3.0"),
        (DynHeads, {"experts": 2, "window": 0}, "window=0"),
        (DynLoRA, {"experts": 2, "base": GQA(), "rank": 0}, "rank=0"),
        (DynLoRA, {"experts": 2, "base": GQA(), "alpha": float("nan")}, "alpha=nan"),
    ],
)
def test_invalid_configs_are_refused_in_one_line(kind, keys, output):
    with pytest.raises(ValueError, match=output):
        kind(**keys)


def test_head_widths_are_checked_in_the_config():
    with pytest.raises(ValueError, match="heads=5"):
        DynHeads(experts=2, heads=5).check(32)
    with pytest.raises(ValueError, match="heads=5"):
        DynLoRA(experts=2, base=GQA(heads=5)).check(32)

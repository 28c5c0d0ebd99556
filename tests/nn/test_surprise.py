"""Surprise against autograd with separate copies of the weights for every token (promises M)."""

import pytest
import torch
import torch.nn.functional as F

from tests.oracles.surprise import causal_loss, copies, dense, output
from tinsmith.nn.contract import BuildContext, Ctx
from tinsmith.nn.feedforwards.dynmoe import DynMoE, DynMoEFeedForward
from tinsmith.nn.layers.linear import init_weights
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.nn.moe.cosine_router import CosineRouter
from tinsmith.nn.moe.surprise import (
    CollectedProbes,
    ExpertMatrices,
    closed_form_surprise,
    collect_probes,
)

N, E, D = 14, 5, 8
CTX = Ctx(torch.arange(N)[None])


def made(**keys) -> DynMoEFeedForward:
    torch.manual_seed(0)
    keys = {"experts": E, "hidden_dim": 6, "router_grad": "smk"} | keys
    feed = DynMoE(**keys).build(BuildContext(dim=D, layer_idx=0, depth=1))
    init_weights(feed, 1)
    with torch.no_grad():
        for stack in feed.experts.parameters():
            stack *= 3
        feed.gate.prototypes += 0.1 * torch.randn(E, D)
    return feed.double()


def tokens(seed: int = 1) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=made, dtype=torch.float64)


def hear(feed: DynMoEFeedForward, x_ND: torch.Tensor, scale: float = 1.0) -> CollectedProbes:
    out = feed(x_ND[None], CTX)
    loss = scale * causal_loss(out.y[0]) + sum(out.losses.values())
    loss.backward()
    found = collect_probes(out.grad_probes)
    assert found is not None
    return found


KINDS = {
    "mean": {},
    "sum": {"combine": "sum"},
    "rescaled": {"combine": "rescaled_sum"},
    "relu2": {"activation": "relu2"},
    "both": {"router_grad": "both"},
    "whole": {"candidates": "all"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_M1_M2_surprise_and_gradients_equal_a_copy_of_the_weights_per_token(kind):
    feed, x = made(**KINDS[kind]), tokens()
    found = hear(feed, x)
    choice = feed.gate(x)
    mask, weight = choice.mask_NE, choice.weight_NE.detach()
    assert 1 < mask.sum(-1).double().mean() < E
    own = copies(feed.experts, N)
    causal_loss(dense(x, own, weight, mask)).backward()
    squared = sum(copy.grad.square().sum((-2, -1)) for copy in own.values())
    assert torch.equal(found.active_NE, mask)
    measured = found.surprise_NE * weight.where(mask, 0)
    torch.testing.assert_close(measured, squared.sqrt(), rtol=1e-12, atol=1e-15)
    assert (found.surprise_NE[mask] > 0).double().mean() > 0.9
    for name, stack in feed.experts.named_children():
        summed = own[name].grad.sum(0)
        torch.testing.assert_close(stack.weight.grad, summed, rtol=1e-12, atol=1e-12)


def test_M1_in_float32():
    x = tokens()
    expected = hear(made(), x).surprise_NE
    found = hear(made().float(), x.float()).surprise_NE
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


def test_M3_surprise_scales_with_the_loss():
    x = tokens()
    one, scaled = (hear(made(), x, scale).surprise_NE for scale in (1.0, 65536.0))
    torch.testing.assert_close(scaled, 65536.0 * one, rtol=1e-12, atol=0)


def test_M4_hooks_on_the_linear_layers_of_each_expert_agree():
    """The slow way: x and dy of every linear, in a model of separate experts."""
    feed, x = made(combine="sum"), tokens()
    expected = hear(feed, x).surprise_NE
    mask = feed.gate(x).mask_NE
    squared = torch.zeros(N, E, dtype=torch.float64)
    outs = torch.zeros(N, D, dtype=torch.float64)
    for expert in range(E):
        linears = {}
        for name, stack in feed.experts.named_children():
            linear = torch.nn.Linear(*stack.weight[expert].T.shape, bias=False).double()
            linear.weight.data = stack.weight[expert].detach().clone()

            def keep(module, inputs, output, expert=expert):
                given = inputs[0].detach().square().sum(-1)

                def add(dy):
                    squared[mask[:, expert], expert] += dy.square().sum(-1) * given

                output.register_hook(add)

            linear.register_forward_hook(keep)
            linears[name] = linear
        rows = x[mask[:, expert]]
        inner = F.silu(linears["gate_proj"](rows)) * linears["up_proj"](rows)
        outs = outs.index_add(0, mask[:, expert].nonzero().flatten(), linears["down_proj"](inner))
    causal_loss(outs).backward()
    torch.testing.assert_close(expected, squared.sqrt(), rtol=1e-12, atol=1e-15)


def test_M5_finite_differences_of_a_copy_agree():
    feed, x = made(), tokens()
    found = hear(feed, x)
    choice = feed.gate(x)
    mask, weight = choice.mask_NE, choice.weight_NE.detach()
    token, expert = mask.nonzero()[5].tolist()
    own = {name: copy.detach() for name, copy in copies(feed.experts, N).items()}
    squared = 0.0
    for copy in own.values():
        row = copy[token, expert]
        for place in range(row.numel()):
            sides = []
            for step in (1e-5, -2e-5):
                row.view(-1)[place] += step
                sides.append(causal_loss(dense(x, own, weight, mask)))
            row.view(-1)[place] += 1e-5
            squared += float((sides[0] - sides[1]) / 2e-5) ** 2
    expected = found.surprise_NE[token, expert] * weight[token, expert]
    assert squared**0.5 == pytest.approx(float(expected), rel=1e-6)


def test_M7_the_gradient_of_an_experts_output_gives_only_its_weight():
    """Why surprise is of weights: |dL/dy_te| = c_te |g_t|, the same order in every token."""
    feed, x = made(), tokens()
    choice = feed.gate(x)
    weight = torch.rand(N, E, dtype=torch.float64).where(choice.mask_NE, 0)
    shared = {name: stack.weight[None] for name, stack in feed.experts.named_children()}
    each = output(x, shared).detach().requires_grad_()
    summed = torch.einsum("ne,ned->nd", weight, each)
    summed.retain_grad()
    causal_loss(summed).backward()
    expected = weight * summed.grad.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(each.grad.norm(dim=-1), expected, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_the_closed_form_equals_the_probes_and_covers_other_experts(activation):
    feed, x = made(activation=activation, candidates="all"), tokens()
    found = hear(feed, x)
    experts = feed.experts
    gate = None if experts.gate_proj is None else experts.gate_proj.weight
    weights = ExpertMatrices(gate, experts.up_proj.weight, experts.down_proj.weight)
    everyone = torch.ones(N, E, dtype=torch.bool)
    surprise, size = closed_form_surprise(weights, x, found.output_grad_ND, everyone)
    active = found.active_NE
    torch.testing.assert_close(surprise[active], found.surprise_NE[active], rtol=1e-12, atol=0)
    torch.testing.assert_close(size[active], found.output_norm_NE[active], rtol=1e-12, atol=0)
    assert (surprise[~active] > 0).all()
    own = copies(experts, N)
    # the value if every expert had weight 1 and the same output gradient g
    (output(x, own) * found.output_grad_ND[:, None]).sum().backward()
    squared = sum(copy.grad.square().sum((-2, -1)) for copy in own.values())
    torch.testing.assert_close(surprise, squared.sqrt(), rtol=1e-12, atol=1e-15)


def test_no_probes_are_collected_without_the_losses():
    feed = made()
    out = feed(tokens()[None], CTX)
    causal_loss(out.y[0]).backward()
    assert collect_probes(out.grad_probes) is None
    assert feed.after_backward(out.grad_probes) == {}


def test_probes_change_no_output():
    feed, x = made(), tokens()[None]
    assert torch.equal(feed(x, CTX).y, feed.eval()(x, CTX).y)


def model(**keys) -> LM:
    torch.manual_seed(0)
    feed = {"kind": "dyn_moe", "hidden_dim": 24, "experts": 6, "router_grad": "smk"} | keys
    layer = {"mixer": {"kind": "gqa", "heads": 4}, "feed_forward": feed}
    section = {"vocab_size": 48, "dim": 32, "depth": 2, "max_seq_len": 64, "pattern": [layer]}
    return LM(ModelConfig.from_dict(section)).train()


def probed(lm: LM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every gradient and every surprise of one step."""
    out = lm(ids)
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    (loss + sum(out.losses.values())).backward()
    lm.after_backward(out.grad_probes)
    text = {name: parameter.grad for name, parameter in lm.named_parameters()}
    for layer in range(2):
        found = collect_probes(
            {k.split(".")[-1]: v for k, v in out.grad_probes.items() if k[0] == str(layer)}
        )
        text |= {f"{layer}.{name}": getattr(found, name) for name in ("surprise_NE", "active_NE")}
    return text


@pytest.mark.parametrize("half", [False, True])
def test_M9_checkpointing_changes_neither_masks_nor_surprise_nor_gradients(half, ids):
    found = []
    for checkpointing in (False, True):
        lm = model()
        lm.activation_checkpointing = checkpointing
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found.append(probed(lm, ids))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_M9_the_selection_is_not_recomputed(ids, monkeypatch):
    expected = probed(model(), ids)
    lm, calls = model(), []
    lm.activation_checkpointing = True
    honest = CosineRouter.margins

    def turned(self, x_ND):
        """Correct in the first calls (selection, then SDL), reversed from then on."""
        calls.append(1)
        return honest(self, x_ND) * (1 if len(calls) <= 4 else -1)

    monkeypatch.setattr(CosineRouter, "margins", turned)
    found = probed(lm, ids)
    assert len(calls) > 4
    for layer in range(2):
        for name in ("surprise_NE", "active_NE"):
            assert torch.equal(found[f"{layer}.{name}"], expected[f"{layer}.{name}"])
    for name, value in expected.items():
        if "experts" in name:
            assert torch.equal(found[name], value), name


def test_M11_every_micro_batch_has_its_own_surprise(ids):
    """Two micro-batches before one step: their gradients add up, their surprises do not mix."""
    alone = [probed(model(), part) for part in ids.split(1)]
    lm = model()
    both = [
        {name: value.clone() for name, value in probed(lm, part).items()} for part in ids.split(1)
    ]
    for found, expected in zip(both, alone, strict=True):
        assert torch.equal(found["0.surprise_NE"], expected["0.surprise_NE"])
    for name, parameter in lm.named_parameters():
        summed = alone[0][name] + alone[1][name]
        torch.testing.assert_close(parameter.grad, summed, rtol=1e-4, atol=1e-7, msg=name)

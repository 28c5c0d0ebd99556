"""`deepseek_moe` against every expert on every token, and against transformers."""

import pytest
import torch
import torch.nn.functional as F

from tests.nn.feeds import DIM, ROWS, SEGMENTS, SITE, TOKENS, context, dense, draw
from tests.oracles import experts as oracle
from tests.oracles.close import close_to
from tinsmith.core.errors import UserError
from tinsmith.nn.feedforwards import DeepSeekMoE
from tinsmith.nn.layers.linear import init_weights
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.nn.moe.balance import update_bias

same = close_to(1e-12)

HIDDEN = 12

CASES = {
    "sigmoid": {"experts": 6, "top_k": 2, "routed_scaling_factor": 2.5},
    "n_group": {"experts": 12, "top_k": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 2},
    "groups of one": {"experts": 4, "top_k": 2, "n_group": 4, "topk_group": 3},
    "softmax": {
        "experts": 6,
        "top_k": 3,
        "score": "softmax",
        "norm_topk_prob": False,
        "n_shared_experts": 0,
    },
    "the seed's": {"experts": 7, "top_k": 1, "score": "softmax", "activation": "relu2"},
    "one of sigmoid": {"experts": 4, "top_k": 1, "norm_topk_prob": True},
}


def build(seed=0, **keys):
    """With a bias that turns choices."""
    torch.manual_seed(seed)
    feed = DeepSeekMoE(hidden_dim=HIDDEN, **keys).build(SITE).double()
    init_weights(feed, 2)
    with torch.no_grad():
        feed.router.weight.mul_(4)
        feed.bias.copy_(0.2 * draw(len(feed.bias), seed=5))
    return feed


def scores_of(feed, x):
    logits = x @ feed.router.weight.T
    return logits.softmax(-1) if feed.config.score == "softmax" else 1 / (1 + (-logits).exp())


def answered(feed, x):
    """(N, D) -> expected output of `feed`, and its mask."""
    config, scores = feed.config, scores_of(feed, x)
    opened = oracle.in_groups(scores + feed.bias, config.n_group, config.num_topk_groups)
    mask = oracle.chosen(opened, config.top_k)
    return dense(
        feed, x, config.routed_scaling_factor * oracle.weights(scores, mask, config.norm_topk_prob)
    ), mask


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_G5_outputs_and_gradients_equal_a_dense_masked_sum(case, segments):
    feed, x = build(**CASES[case]), draw(ROWS, TOKENS, DIM).requires_grad_()
    real = torch.ones(ROWS, TOKENS, dtype=torch.bool) if segments is None else segments >= 0
    dy = draw(ROWS, TOKENS, DIM, seed=2) * real[..., None]
    out = feed(x, context(segments))
    expected, mask = answered(feed, x.flatten(0, 1))
    same(out.y[real], expected.view_as(x)[real])
    assert out.stats["load"].tolist() == mask[real.flatten()].sum(0).tolist()
    assert out.stats["tokens"] == real.sum()
    wanted = [x, *feed.parameters()]
    found = torch.autograd.grad(out.y, wanted, dy)
    same(found, torch.autograd.grad(expected.view_as(x), wanted, dy))


def test_the_bias_affects_the_selection_and_not_the_weights():
    """A bias that turns no choice changes no bit; one that does leaves the chosen weights to the
    scores alone.
    """
    feed, x = build(experts=4, top_k=4), draw(ROWS, TOKENS, DIM)
    before = feed(x, context()).y
    feed.bias.add_(torch.tensor([3.0, -2.0, 0.5, 1.0]))
    same(feed(x, context()).y, before)
    narrow = build(experts=4, top_k=2, norm_topk_prob=False)
    narrow.bias.copy_(torch.tensor([9.0, 9.0, -9.0, -9.0]))
    route = narrow.route(x.flatten(0, 1))
    assert sorted(route.expert_indices_NK[0].tolist()) == [0, 1]
    scores = scores_of(narrow, x.flatten(0, 1)).detach()
    same(route.weights_NK.detach(), scores.gather(1, route.expert_indices_NK))
    assert not feed.bias.requires_grad
    assert "bias" in feed.state_dict()


def test_the_sequence_loss_uses_the_selection_without_bias_of_every_row():
    feed = build(experts=6, top_k=2, balance_weight=0.5, n_group=3, topk_group=2).train()
    x, real = draw(ROWS, TOKENS, DIM), SEGMENTS >= 0
    losses = []
    for row in range(ROWS):
        scores = scores_of(feed, x[row, real[row]])
        mask = oracle.chosen(scores, 2)
        shares = scores / scores.sum(-1, keepdim=True)
        losses.append(oracle.switch_loss(shares, mask) / 2)
    expected = torch.stack(losses).mean()
    out = feed(x, context(SEGMENTS))
    same(out.losses, {"balance": 0.5 * expected})
    same(out.stats["balance"], (expected * real.sum()).detach())
    found = torch.autograd.grad(out.losses["balance"], feed.router.weight)
    same(found, torch.autograd.grad(0.5 * expected, feed.router.weight))
    assert not feed.eval()(x, context()).losses


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_the_router_has_a_task_gradient_at_k_1(score):
    feed, x = build(experts=4, top_k=1, score=score), draw(ROWS, TOKENS, DIM)
    feed(x, context()).y.square().sum().backward()
    assert feed.router.weight.grad is not None
    assert feed.router.weight.grad.abs().max() > 1e-3


def test_noise_multiplies_logits_in_training_only():
    feed, x = build(experts=6, noise=0.5), draw(200, DIM)
    still = feed.eval().route(x).logits_NE
    same(still, x @ feed.router.weight.T)
    torch.manual_seed(0)
    ratio = (feed.train().route(x).logits_NE / still).detach()
    assert 0.75 <= ratio.min() < 0.77
    assert 1.23 < ratio.max() <= 1.25
    assert ratio.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(build(experts=6).train().route(x).logits_NE, still)


def imbalance(load):
    return (load.max() / load.double().mean()).item()


def simulated(rate, steps=200):
    """Loads of 8 experts before and after `steps` updates, with a gate that prefers some."""
    generator = torch.Generator().manual_seed(3)
    preference = torch.linspace(-1, 1, 8)
    bias, loads = torch.zeros(8), []
    for _ in range(steps):
        scores = (torch.randn(512, 8, generator=generator) + preference).sigmoid()
        load = (scores + bias).topk(2, -1).indices.flatten().bincount(minlength=8)
        loads.append(imbalance(load))
        update_bias(bias, load, rate)
    return loads[0], loads[-1]


def test_the_bias_update_lowers_the_imbalance_in_200_steps_and_reversed_raises_it():
    before, after = simulated(0.005)
    assert before > 2
    assert after < 1.25
    before, after = simulated(-0.005)
    assert after > before + 0.5


def test_post_step_moves_the_bias_by_the_update_speed_against_the_load():
    feed = build(experts=4, bias_update_speed=0.01)
    feed.bias.zero_()
    assert feed.post_step({"load": torch.tensor([9, 1, 5, 5])}) == []
    assert feed.bias.tolist() == [-0.01, 0.01, 0.0, 0.0]
    still = build(experts=4, bias_update_speed=0.0)
    before = still.bias.clone()
    still.post_step({"load": torch.tensor([9, 1, 5, 5])})
    assert torch.equal(still.bias, before)


def test_casts_do_not_round_the_bias():
    """As in transformers: a rounded bias would select other experts and would no longer change."""
    feed = build(experts=4, bias_update_speed=0.001).float()
    feed.bias.copy_(torch.tensor([0.5, 0.501, -0.3333, 0.0]))
    before = feed.bias.clone()
    for cast in (feed.bfloat16, feed.half, lambda: feed.to(torch.bfloat16)):
        cast()
        assert feed.router.weight.dtype != torch.float32
        assert feed.bias.dtype == torch.float32
        assert torch.equal(feed.bias, before)
    feed.post_step({"load": torch.tensor([9, 1, 5, 5])})
    assert feed.bias.tolist() == pytest.approx([0.499, 0.502, -0.3333, 0.0], abs=1e-7)
    assert feed.double().bias.dtype == torch.float64
    assert "bias" in feed.state_dict()
    assert feed.to("meta").bias.is_meta


def test_it_equals_the_moe_block_of_deepseek_v3():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=DIM,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=12,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        n_shared_experts=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    block = DeepseekV3MoE(config)
    feed = build(
        experts=12, top_k=4, n_group=4, topk_group=2, n_shared_experts=2, routed_scaling_factor=2.5
    ).float()
    stacks = feed.experts
    state = {
        "gate.weight": feed.router.weight,
        "gate.e_score_correction_bias": feed.bias,
        "experts.gate_up_proj": torch.cat((stacks.gate_proj.weight, stacks.up_proj.weight), 1),
        "experts.down_proj": stacks.down_proj.weight,
    }
    state |= {f"shared_experts.{name}": value for name, value in feed.shared.state_dict().items()}
    block.load_state_dict({name: tensor.detach() for name, tensor in state.items()})
    x = draw(ROWS, TOKENS, DIM).float()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, wanted = feed(ours, context()).y, block(theirs)
    same(found, wanted, 1e-5)
    found.square().sum().backward()
    wanted.square().sum().backward()
    same(ours.grad, theirs.grad, 1e-4)
    same(feed.router.weight.grad, block.gate.weight.grad, 1e-4)


def section(**feed):
    gqa = {"kind": "gqa", "heads": 2}
    layer = {"mixer": gqa, "feed_forward": {"kind": "deepseek_moe", "hidden_dim": 12} | feed}
    return {"vocab_size": 40, "dim": 16, "depth": 2, "pattern": [layer]}


def test_every_layer_gets_its_own_load():
    lm = LM(ModelConfig.from_dict(section(experts=6, bias_update_speed=0.5))).train()
    out = lm(torch.randint(0, 40, (4, 17), generator=torch.Generator().manual_seed(0)))
    assert lm.post_step(out.stats) == []
    biases = [block.feed.bias for block in lm.blocks]
    for layer, bias in enumerate(biases):
        load = out.stats[f"{layer}.feed.load"].double()
        assert bias.tolist() == (0.5 * (load.mean() - load).sign()).tolist()
    assert not torch.equal(*biases)
    one, shared = 3 * 16 * 12, 1
    assert lm.parameter_count() - lm.active_parameter_count() == 2 * (6 - 2) * one
    assert lm.blocks[0].feed.flops() == 2 * 16 * 6 + 2 * one * (2 + shared)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"experts": 4, "top_k": 5}, "top_k=5 must be at most experts=4"),
        ({"experts": 0}, "experts=0 must be at least 1"),
        ({"experts": 8, "n_group": 3}, "n_group=3 must divide experts=8"),
        ({"n_group": 0}, "n_group=0 must divide experts=8"),
        ({"experts": 8, "n_group": 4, "topk_group": 5}, "topk_group=5 must be from 1 to n_group=4"),
        ({"experts": 8, "n_group": 4, "topk_group": 0}, "topk_group=0 must be from 1"),
        (
            {"experts": 8, "top_k": 3, "n_group": 4, "topk_group": 1},
            "top_k=3 is more than the 2 experts of topk_group",
        ),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor=0.0 must be above 0"),
        ({"bias_update_speed": -1}, "bias_update_speed=-1.0 must be at least 0"),
        ({"noise": -0.1}, "noise=-0.1 must be at least 0"),
        ({"noise": 2.5}, "noise=2.5 must be at most 2"),
        ({"score": "relu"}, "relu"),
    ],
)
def test_invalid_keys_give_one_line(keys, message):
    with pytest.raises(UserError, match=message) as caught:
        ModelConfig.from_dict(section(**keys))
    assert "\n" not in str(caught.value)


def test_training_on_random_tokens_stays_at_ln_v():
    torch.manual_seed(0)
    lm = LM(
        ModelConfig.from_dict(section(experts=8, top_k=2, bias_update_speed=0.01, noise=0.02))
    ).train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        ids = torch.randint(0, 40, (8, 33))
        out = lm(ids[:, :-1])
        loss = F.cross_entropy(out.logits.flatten(0, 1), ids[:, 1:].flatten())
        (loss + sum(out.losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        lm.post_step(out.stats)
        losses.append(loss.item())
    expected = torch.tensor(40.0).log().item()
    assert min(losses) > expected - 0.03
    assert losses[-1] < expected + 0.15

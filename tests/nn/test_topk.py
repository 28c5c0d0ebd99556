"""`topk_moe` against every expert on every token, and against transformers."""

import pytest
import torch
import torch.nn.functional as F

from tests.nn.feeds import DIM, ROWS, SEGMENTS, SITE, TOKENS, context, dense, draw
from tests.oracles import experts as oracle
from tests.oracles.close import close_to
from tinsmith.core.errors import UserError
from tinsmith.nn.feedforwards import SwiGLU, TopKMoE
from tinsmith.nn.layers.linear import init_weights
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.nn.moe import balance
from tinsmith.optim.groups import partition

same = close_to(1e-12)

HIDDEN = 24

CASES = {
    "swiglu": {"experts": 5, "top_k": 2},
    "relu2, shared": {"experts": 4, "top_k": 3, "n_shared_experts": 2, "activation": "relu2"},
    "not renormalised": {"experts": 6, "top_k": 3, "norm_topk_prob": False},
    "one": {"experts": 4, "top_k": 1, "n_shared_experts": 1},
    "all": {"experts": 3, "top_k": 3},
    "a single expert": {"experts": 1, "top_k": 1, "norm_topk_prob": False},
}


def build(seed=0, **keys):
    torch.manual_seed(seed)
    feed = TopKMoE(hidden_dim=HIDDEN, **keys).build(SITE).double()
    init_weights(feed, 2)
    with torch.no_grad():
        feed.router.weight.mul_(4)
    return feed


def answered(feed, x):
    """(N, D) -> expected output of `feed`, its probabilities and its mask."""
    probabilities = (x @ feed.router.weight.T).softmax(-1)
    mask = oracle.chosen(probabilities, feed.config.top_k)
    table = oracle.weights(probabilities, mask, feed.config.norm_topk_prob)
    return dense(feed, x, table), probabilities, mask


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_G5_outputs_and_gradients_equal_a_dense_masked_sum(case, segments):
    feed, x = build(**CASES[case]), draw(ROWS, TOKENS, DIM).requires_grad_()
    real = torch.ones(ROWS, TOKENS, dtype=torch.bool) if segments is None else segments >= 0
    dy = draw(ROWS, TOKENS, DIM, seed=2) * real[..., None]
    out = feed(x, context(segments))
    expected, _, mask = answered(feed, x.flatten(0, 1))
    same(out.y[real], expected.view_as(x)[real])
    assert out.stats["load"].tolist() == mask[real.flatten()].sum(0).tolist()
    assert out.stats["load"].sum() == feed.top_k * out.stats["tokens"]
    assert out.stats["tokens"] == real.sum()
    wanted = [x, *feed.parameters()]
    found = torch.autograd.grad(out.y, wanted, dy)
    same(found, torch.autograd.grad(expected.view_as(x), wanted, dy))


@pytest.mark.parametrize("name", ["switch", "sequence", "squared"])
def test_A6_balance_losses_and_their_gradients_equal_their_formulas(name):
    feed = build(experts=5, top_k=2, balance=name, balance_weight=0.3, z_weight=0.2).train()
    x, real = draw(ROWS, TOKENS, DIM), SEGMENTS >= 0
    out = feed(x, context(SEGMENTS))
    _, probabilities, mask = answered(feed, x.flatten(0, 1))
    tables = [table.view(ROWS, TOKENS, -1) for table in (probabilities, mask)]
    rows = [tuple(table[b][real[b]] for table in tables) for b in range(ROWS)]
    every = [torch.cat(parts) for parts in zip(*rows, strict=True)]
    expected = {
        "switch": lambda: oracle.switch_loss(*every),
        "sequence": lambda: torch.stack([oracle.switch_loss(*row) / 2 for row in rows]).mean(),
        "squared": lambda: 5 * ((every[0].mean(0) - 1 / 5) ** 2).sum(),
    }[name]()
    z = (x[real] @ feed.router.weight.T).logsumexp(-1).square().mean()
    same(out.losses, {"balance": 0.3 * expected, "router_z": 0.2 * z})
    count = real.sum()
    same(out.stats["balance"], (expected * count).detach())
    same(out.stats["router_z"], (z * count).detach())
    found = torch.autograd.grad(sum(out.losses.values()), feed.router.weight)
    wanted = torch.autograd.grad(0.3 * expected + 0.2 * z, feed.router.weight)
    same(found, wanted)
    assert found[0].abs().max() > 1e-4


def test_the_switch_loss_equals_transformers_layer_by_layer():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    feed, x = build(experts=5, top_k=2, balance_weight=1.0).train(), draw(ROWS, TOKENS, DIM)
    for segments in (None, SEGMENTS):
        logits = (x.flatten(0, 1) @ feed.router.weight.T).detach()
        mask = None if segments is None else (segments >= 0).long()
        theirs = load_balancing_loss_func((logits,), 5, 2, mask)
        same(feed(x, context(segments)).losses["balance"].float(), theirs, 1e-6)


def test_entropy_is_summed_over_tokens():
    feed, x = build(experts=5, top_k=2), draw(ROWS, TOKENS, DIM)
    real = (SEGMENTS >= 0).flatten()
    probabilities = answered(feed, x.flatten(0, 1))[1][real]
    expected = -(probabilities * probabilities.log()).sum()
    same(feed(x, context(SEGMENTS)).stats["entropy"], expected.detach())


def test_balance_losses_are_minimal_for_equal_loads():
    """K for `switch`, 1 for `sequence`, 0 for `squared`; more where one expert gets all."""
    even = torch.full((1, 6, 3), 1 / 3)
    turns = torch.tensor([[[0, 1], [1, 2], [2, 0], [0, 1], [1, 2], [2, 0]]])
    everyone = torch.ones(1, 6, dtype=torch.bool)
    crowd = torch.tensor([0.8, 0.1, 0.1]).expand(1, 6, 3)
    same_two = torch.tensor([0, 1]).expand(1, 6, 2)
    for name, floor in (("switch", 2.0), ("sequence", 1.0), ("squared", 0.0)):
        loss = balance.BALANCE_LOSSES[name]
        assert loss(even, turns, everyone).item() == pytest.approx(floor, abs=1e-6)
        assert loss(crowd, same_two, everyone) > floor + 0.1


def test_G8_a_batch_of_padding_has_no_loss_and_no_load():
    feed = build(experts=5, top_k=2, z_weight=1.0).train()
    for name in ("switch", "sequence", "squared"):
        feed.config = TopKMoE(hidden_dim=HIDDEN, experts=5, balance=name, z_weight=1.0)
        x = draw(ROWS, TOKENS, DIM).requires_grad_()
        out = feed(x, context(torch.full((ROWS, TOKENS), -1)))
        assert not out.stats["load"].any()
        assert all(value == 0 for value in out.losses.values())
        (out.y.sum() + sum(out.losses.values())).backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_losses_exist_in_training_only():
    assert not build(experts=4).eval()(draw(ROWS, TOKENS, DIM), context()).losses
    silent = build(experts=4, balance="none").train()
    assert not silent(draw(ROWS, TOKENS, DIM), context()).losses


def test_C1_the_router_has_a_task_gradient_at_k_1():
    """Renormalised to 1, a single weight has no gradient."""
    feed, x = build(experts=4, top_k=1), draw(ROWS, TOKENS, DIM)
    feed(x, context()).y.square().sum().backward()
    assert feed.router.weight.grad is not None
    assert feed.router.weight.grad.abs().max() > 1e-3


def test_equal_scores_select_the_first_experts():
    feed = build(experts=5, top_k=2)
    with torch.no_grad():
        feed.router.weight.zero_()
    load = feed(draw(ROWS, TOKENS, DIM), context()).stats["load"]
    assert load.tolist() == [ROWS * TOKENS] * 2 + [0] * 3


def test_G7_permuted_experts_give_equal_outputs_with_permuted_loads():
    feed, other = (
        build(experts=5, top_k=2, n_shared_experts=1),
        build(experts=5, top_k=2, n_shared_experts=1),
    )
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        for parameter in (other.router.weight, *other.experts.parameters()):
            parameter.copy_(parameter[order])
    x = draw(ROWS, TOKENS, DIM)
    one, two = feed(x, context()), other(x, context())
    same(two.y, one.y)
    assert two.stats["load"].tolist() == one.stats["load"][order].tolist()


def test_selecting_all_experts_gives_their_weighted_sum():
    feed, x = build(experts=3, top_k=3, norm_topk_prob=False), draw(4, DIM)
    stacks = feed.experts
    shares = (x @ feed.router.weight.T).softmax(-1)
    expected = torch.zeros_like(x)
    for e in range(3):
        one = SwiGLU(hidden_dim=HIDDEN).build(SITE).double()
        one.load_state_dict(
            {
                f"{name}.weight": getattr(stacks, name).weight[e]
                for name in ("gate_proj", "up_proj", "down_proj")
            }
        )
        expected = expected + shares[:, e, None] * one(x[None], context()).y[0]
    same(feed(x[None], context(rows=1, tokens=4)).y[0], expected)


def theirs_with_our_weights(block, feed):
    stacks = feed.experts
    state = {
        "gate.weight": feed.router.weight,
        "experts.gate_up_proj": torch.cat((stacks.gate_proj.weight, stacks.up_proj.weight), 1),
        "experts.down_proj": stacks.down_proj.weight,
    }
    block.load_state_dict({name: tensor.detach().float() for name, tensor in state.items()})
    return block


def assert_alike(block, feed):
    x = draw(ROWS, TOKENS, DIM).float()
    feed = feed.float()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, wanted = feed(ours, context()).y, block(theirs)
    same(found, wanted, 1e-5)
    found.square().sum().backward()
    wanted.square().sum().backward()
    same(ours.grad, theirs.grad, 1e-5)
    same(feed.router.weight.grad, block.gate.weight.grad, 1e-5)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_it_equals_the_moe_block_of_qwen3(norm_topk_prob):
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=DIM,
        moe_intermediate_size=HIDDEN,
        num_experts=6,
        num_experts_per_tok=3,
        norm_topk_prob=norm_topk_prob,
    )
    feed = build(experts=6, top_k=3, norm_topk_prob=norm_topk_prob)
    assert_alike(theirs_with_our_weights(Qwen3MoeSparseMoeBlock(config), feed), feed)


def test_it_equals_the_moe_block_of_mixtral():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=4)
    feed = build(experts=4, top_k=2)
    assert_alike(theirs_with_our_weights(MixtralSparseMoeBlock(config), feed), feed)


def small(**feed):
    gqa = {"kind": "gqa", "heads": 2}
    section = {"vocab_size": 40, "dim": 16, "depth": 2, "pattern": []}
    section["pattern"] = [{"mixer": gqa, "feed_forward": {"hidden_dim": 24} | feed}]
    return section


def test_weights_have_roles_and_inactive_parameters_are_counted():
    lm = LM(ModelConfig.from_dict(small(kind="topk_moe", experts=4, top_k=1, n_shared_experts=1)))
    roles = {name: role for role, group in partition(lm).items() for name, _ in group}
    assert roles["blocks.0.feed.router.weight"] == "router"
    assert roles["blocks.0.feed.experts.down_proj.weight"] == "matrix"
    assert roles["blocks.0.feed.shared.up_proj.weight"] == "matrix"
    assert lm.parameter_count() - lm.active_parameter_count() == 2 * 3 * (3 * 16 * 24)
    dense_lm = LM(ModelConfig.from_dict(small(kind="swiglu")))
    assert dense_lm.active_parameter_count() == dense_lm.parameter_count()
    one, router = 6 * 16 * 24, 2 * 16 * 4
    assert lm.blocks[0].feed.flops() == router + 2 * one


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"experts": 4, "top_k": 5}, "top_k=5 must be at most experts=4"),
        ({"experts": 0}, "experts=0 must be at least 1"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"hidden_dim": 0}, "hidden_dim=0 must be at least 1"),
        ({"n_shared_experts": -1}, "n_shared_experts=-1 must be at least 0"),
        ({"balance_weight": -0.1}, "balance_weight=-0.1 must be at least 0"),
        ({"z_weight": -1}, "z_weight=-1.0 must be at least 0"),
        ({"balance": "swich"}, "swich"),
        ({"activation": "gelu"}, "gelu"),
        ({"topk": 2}, "topk"),
    ],
)
def test_invalid_keys_give_one_line(keys, message):
    with pytest.raises(UserError, match=message) as caught:
        ModelConfig.from_dict(small(kind="topk_moe", **keys))
    assert "\n" not in str(caught.value)


def test_training_on_random_tokens_stays_at_ln_v():
    """A routed model with a lower loss on random tokens would see its targets."""
    torch.manual_seed(0)
    config = small(kind="topk_moe", experts=4, top_k=1)
    lm = LM(ModelConfig.from_dict(config)).train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        ids = torch.randint(0, 40, (8, 33))
        out = lm(ids[:, :-1])
        loss = F.cross_entropy(out.logits.flatten(0, 1), ids[:, 1:].flatten())
        (loss + sum(out.losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    expected = torch.tensor(40.0).log().item()
    assert min(losses) > expected - 0.03
    assert losses[-1] < expected + 0.15

"""LoRA of models with routers, under autocast, as they are trained."""

import pytest
import torch

from tinsmith.nn import lora
from tinsmith.nn.contract import Ctx
from tinsmith.nn.lora import LoRA
from tinsmith.nn.model import LM, ModelConfig, ModelOut

FEEDS = {
    "topk_moe": {"kind": "topk_moe", "hidden_dim": 32, "experts": 8, "top_k": 2},
    "deepseek_moe": {"kind": "deepseek_moe", "hidden_dim": 32, "experts": 8},
    "dyn_moe": {"kind": "dyn_moe", "hidden_dim": 32, "experts": 8},
}
every_feed = pytest.mark.parametrize("kind", FEEDS)
linear_gates = pytest.mark.parametrize("kind", ["topk_moe", "deepseek_moe"])
IDS = torch.randint(0, 64, (8, 64), generator=torch.Generator().manual_seed(1))


def made(kind: str) -> LM:
    torch.manual_seed(0)
    layer = {"mixer": {"kind": "gqa", "heads": 4}, "feed_forward": FEEDS[kind]}
    section = {"vocab_size": 64, "dim": 64, "depth": 2, "pattern": [layer]}
    return LM(ModelConfig.from_dict(section)).eval()


def half(says, *inputs):
    """Outputs under autocast with a fresh cache of casts."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return says(*inputs)


def same(one: ModelOut, other: ModelOut) -> bool:
    """Bit equality, including the outputs of routers."""
    pairs = ((one.logits, other.logits), *((one.stats[k], other.stats[k]) for k in one.stats))
    return all(torch.equal(*pair) for pair in pairs)


def stir(lm: LM) -> None:
    made = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in lora.adapters(lm).values():
            adapter.B.normal_(std=0.05, generator=made)


@pytest.mark.parametrize("targets", ["all", "*"])
@every_feed
def test_with_B_zero_or_disabled_it_equals_the_base_to_the_bit(kind, targets):
    lm = made(kind)
    base = half(lm, IDS)
    lora.add_adapters(lm, LoRA(targets=targets, rank=2))
    assert same(half(lm, IDS), base)
    stir(lm)
    assert not same(half(lm, IDS), base)
    with lora.disable_adapters(lm):
        assert same(half(lm, IDS), base)


@linear_gates
def test_an_adapted_router_keeps_its_precision_and_equals_the_merged_one(kind):
    lm = made(kind)
    lora.add_adapters(lm, LoRA(targets="router", rank=2))
    router, x = lm.blocks[0].feed.router, torch.randn(5, 64)
    base = half(lm, IDS)
    stir(lm)
    adapted, output = half(lm, IDS), half(router, x)
    assert output.dtype == torch.float32
    adapter = lora.adapters(lm)["blocks.0.feed.router.weight"]
    weight = made(kind).blocks[0].feed.router.weight + adapter.scaling * adapter.B @ adapter.A
    torch.testing.assert_close(output, x @ weight.T, rtol=1e-6, atol=1e-6)
    assert not same(adapted, base)
    lora.merge(lm)
    merged = half(lm, IDS)
    torch.testing.assert_close(half(router, x), output, rtol=1e-6, atol=1e-6)
    assert all(
        torch.equal(merged.stats[f"{i}.feed.load"], adapted.stats[f"{i}.feed.load"]) for i in (0, 1)
    )
    torch.testing.assert_close(merged.logits, adapted.logits, rtol=0, atol=0.02)


@every_feed
def test_merged_routers_select_the_same_experts_as_adapted_ones(kind):
    """Other layers are in bf16 and round differently."""
    lm = made(kind)
    lora.add_adapters(lm, LoRA(targets="all", rank=2))
    stir(lm)
    x, ctx = torch.randn(8, 64, 64), Ctx(torch.arange(64).expand(8, 64))
    found, logits = [], []
    for change in (lambda _: None, lora.merge):
        change(lm)
        found.append([half(block.feed.expert_mask, x, ctx) for block in lm.blocks])
        logits.append(half(lm, IDS).logits)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    apart = (logits[0] - logits[1]).abs().median()
    assert apart < 0.02 * logits[0].std()


@linear_gates
def test_an_adapted_router_has_a_gradient(kind):
    lm = made(kind).train()
    lora.add_adapters(lm, LoRA(targets="router", rank=2))
    stir(lm)
    with torch.autocast("cpu", torch.bfloat16):
        out = lm(IDS)
        (out.logits.square().mean() + sum(out.losses.values())).backward()
    grads = {name: each.grad for name, each in lm.named_parameters() if each.grad is not None}
    gates = [f"blocks.{layer}.feed.router.lora.weight." for layer in (0, 1)]
    assert set(grads) == {gate + leaf for gate in gates for leaf in "AB"}
    assert all((grad != 0).any() for grad in grads.values())


@linear_gates
def test_dropout_acts_on_the_input_of_A_in_training_only(kind):
    lm = made(kind)
    lora.add_adapters(lm, LoRA(targets="router", rank=2, dropout=0.5))
    router, x = lm.blocks[0].feed.router, torch.randn(5, 64)
    base = half(lm.train(), IDS)
    assert torch.equal(half(router.train(), x), half(router.eval(), x))
    stir(lm)
    still = half(router, x)
    assert torch.equal(half(router, x), still)
    assert not torch.equal(half(router.train(), x), still)
    with lora.disable_adapters(lm):
        assert same(half(lm.train(), IDS), base)

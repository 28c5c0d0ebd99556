"""Quantised weights: exact products with the dequantised weight, bounded errors, fewer bytes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tinsmith.nn import quant
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.nn.quant import quantize

KINDS = ("int8", "nf4")


def model(dim: int = 64, **mixer: object) -> LM:
    attention = {"kind": "gqa", "heads": 4} | mixer
    layer = {"mixer": attention, "feed_forward": {"kind": "swiglu", "hidden_dim": 200}}
    section = {"vocab_size": 50, "dim": dim, "depth": 2, "max_seq_len": 32, "pattern": [layer]}
    return LM(ModelConfig.from_dict(section)).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_quantised_linear_equals_the_product_with_its_dequantised_weight(kind, dtype):
    linear = nn.Linear(70, 60, dtype=dtype)
    bias = linear.bias.detach().clone()
    quantize(linear, kind)
    x = torch.randn(5, 70, dtype=dtype, requires_grad=True)
    y = linear(x)
    assert y.dtype == dtype
    assert torch.equal(y, F.linear(x, linear.weight, bias))
    (grad,) = torch.autograd.grad(y.sum(), [x])
    assert torch.equal(grad, torch.ones_like(y) @ linear.weight)
    assert not y.detach().requires_grad
    assert not any(parameter.requires_grad for parameter in linear.parameters())


def test_int8_error_is_at_most_half_a_step_of_its_row():
    weight = torch.randn(60, 100) * torch.logspace(-3, 3, 60)[:, None]
    linear = nn.Linear(100, 60, bias=False)
    linear.weight.data = weight.clone()
    quantize(linear, "int8")
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((linear.weight - weight).abs() <= step * 0.5001).all())
    error = (linear.weight - weight).norm(dim=1) / weight.norm(dim=1)
    assert 0.001 < float(error.mean()) < 0.01


def test_nf4_takes_the_nearest_level_of_its_block():
    linear = nn.Linear(96, 64, bias=False)
    weight = linear.weight.detach().clone()
    quantize(linear, "nf4")
    levels = torch.tensor(quant.NF4_LEVELS)
    blocks = weight.view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] / scale[..., None] - levels).abs().min(-1).values * scale
    found = (linear.weight.view(-1, 64) - blocks).abs()
    assert torch.allclose(found, nearest, atol=1e-6)


def test_nf4_of_normal_weights_has_an_error_of_a_tenth():
    linear = nn.Linear(256, 256, bias=False)
    nn.init.normal_(linear.weight)
    weight = linear.weight.detach().clone()
    quantize(linear, "nf4")
    assert 0.05 < float((linear.weight - weight).norm() / weight.norm()) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_of_experts_is_quantised_too(kind):
    class Experts(nn.Module):
        EXPERT_STACKS = ("up",)

        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 40, 65))

        def forward(self, x):
            return x @ self.up

    experts = Experts()
    exact = experts.up.detach().clone()
    before = quant.nbytes(experts)
    quantize(experts, kind)
    assert experts.up.shape == (3, 40, 65)
    assert 0 < float((experts.up - exact).norm() / exact.norm()) < 0.1
    assert quant.nbytes(experts) < 0.3 * before
    x = torch.randn(3, 2, 40)
    assert torch.equal(experts(x), x @ experts.up)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind):
    linear = nn.Linear(100, 100, bias=False)
    nn.init.zeros_(linear.weight)
    assert bool((quantize(linear, kind).weight == 0).all())


@pytest.mark.parametrize(("kind", "share"), [("bf16", 0.5), ("int8", 0.27), ("nf4", 0.15)])
def test_a_quantised_model_takes_fewer_bytes_and_stays_accurate(kind, share):
    lm = model(dim=128)
    ids = torch.randint(0, 50, (2, 16))
    held = copy.deepcopy(lm)
    quantize(held, kind)
    assert quant.nbytes(held.blocks) <= share * quant.nbytes(lm.blocks)
    assert held.embed.weight is held.head.weight
    with torch.no_grad():
        exact, found = lm(ids).logits, held(ids).logits
    assert found.shape == exact.shape
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < {"bf16": 0.02, "int8": 0.02, "nf4": 0.2}[kind]


def test_fp32_leaves_the_weights_and_freezes_them():
    lm = model()
    before = copy.deepcopy(lm.state_dict())
    quantize(lm, "fp32")
    assert all(torch.equal(before[name], value) for name, value in lm.state_dict().items())
    assert not any(parameter.requires_grad for parameter in lm.parameters())
    with pytest.raises(ValueError, match="weights=int3 must be one of fp32, bf16, int8, nf4"):
        quantize(lm, "int3")


def test_every_mixer_runs_with_quantised_weights():
    lm = model(kind="mla", kv_rank=64, nope_dim=32, rope_dim=16, v_dim=32, heads=4)
    exact = lm(torch.arange(8)[None]).logits
    quantize(lm, "int8")
    found = lm(torch.arange(8)[None]).logits
    assert float((found - exact).detach().norm() / exact.detach().norm()) < 0.05
    caches = lm.new_caches(1, 8)
    steps = [lm(torch.tensor([[i]]), caches=caches).logits for i in range(8)]
    assert torch.allclose(torch.cat(steps, 1), found, atol=1e-4)


def test_modules_with_another_role_are_not_quantised():
    class Router(nn.Module):
        ROLE = "router"

        def __init__(self):
            super().__init__()
            self.score = nn.Linear(128, 64)

    both = nn.ModuleDict({"router": Router(), "up": nn.Linear(128, 64)})
    quantize(both, "int8")
    assert both["router"].score.get_parameter("weight").dtype == torch.float32
    assert "weight" not in dict(both["up"].named_parameters())


def test_nf4_equals_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(48, 64 * 3)
    codes = quant.NF4(weight)
    pairs, scale = codes.right_inverse(weight)
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(theirs.flatten(), pairs)
    assert torch.equal(state.absmax, scale)
    whole = functional.dequantize_4bit(theirs, state)
    assert torch.equal(whole, codes(pairs, scale))
    shape = (len(scale), quant.NF4_BLOCK_SIZE)
    unpack = torch.ops.bitsandbytes.dequantize_4bit
    by_operator = unpack(pairs[:, None], scale, quant.NF4_BLOCK_SIZE, "nf4", shape, torch.float32)
    assert torch.equal(by_operator, quant.dequantize_nf4(pairs, scale))

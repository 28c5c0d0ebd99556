"""Dense feed-forwards against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tinsmith.nn.contract import BuildContext, Ctx
from tinsmith.nn.feedforwards import ReLU2, SwiGLU

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CTX = Ctx(torch.arange(5).expand(2, 5))
SITE = BuildContext(dim=16, layer_idx=0, depth=1)


def test_swiglu_equals_llama():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = LlamaConfig(hidden_size=16, num_attention_heads=2, intermediate_size=24, mlp_bias=True)
    theirs = LlamaMLP(config).double()
    ours = SwiGLU(hidden_dim=24, bias=True).build(SITE).double()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(X, CTX).y, theirs(X))


def test_relu2_equals_its_formula():
    ours = ReLU2(hidden_dim=24, bias=True).build(SITE).double()
    inner = X @ ours.up_proj.weight.T + ours.up_proj.bias
    expected = inner.clamp(min=0) ** 2 @ ours.down_proj.weight.T + ours.down_proj.bias
    torch.testing.assert_close(ours(X, CTX).y, expected)


@pytest.mark.parametrize("config", [SwiGLU(hidden_dim=24), ReLU2(hidden_dim=24)])
def test_flops_are_counted_and_biases_are_off(config):
    ours = config.build(SITE).double()
    with FlopCounterMode(display=False) as counter:
        ours(X, CTX)
    assert counter.get_total_flops() == 10 * ours.flops()
    assert not any(name.endswith("bias") for name, _ in ours.named_parameters())


def test_biases_exist_if_requested():
    for config, count in (
        (SwiGLU(hidden_dim=24, bias=True), 3),
        (ReLU2(hidden_dim=24, bias=True), 2),
    ):
        names = [name for name, _ in config.build(SITE).named_parameters()]
        assert sum(name.endswith("bias") for name in names) == count


def test_gradients_equal_those_of_the_formula():
    ours = SwiGLU(hidden_dim=24).build(SITE).double()
    x, twin = X.clone().requires_grad_(), X.clone().requires_grad_()
    ours(x, CTX).y.square().sum().backward()
    gate, up, down = (p.detach() for p in ours.parameters())
    (F.silu(twin @ gate.T) * (twin @ up.T) @ down.T).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)

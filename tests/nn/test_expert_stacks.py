"""Stacks of experts are declared; another 3-D weight, such as a convolution kernel, is
not a stack.
"""

import pytest
import torch
from torch import nn

from tinsmith.nn import lora
from tinsmith.nn.lora import LoRA
from tinsmith.nn.moe.experts import Experts
from tinsmith.nn.parameters import target_weights
from tinsmith.nn.quant import quantize
from tinsmith.optim.groups import partition


class Part(nn.Module):
    """A linear layer, a full convolution over time and two experts, all large enough for nf4."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(64, 64, bias=False)
        self.conv = nn.Conv1d(64, 64, 4, bias=False)
        self.experts = Experts(64, 2, 64, "swiglu")


STACKS = ["experts.gate_proj.weight", "experts.up_proj.weight", "experts.down_proj.weight"]


@pytest.fixture
def part():
    made = Part()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def test_muon_trains_stacks_and_linear_layers_and_no_convolution(part):
    roles = {role: [name for name, _ in named] for role, named in partition(part).items()}
    assert roles["matrix"] == ["proj.weight", *STACKS]
    assert roles["vector"] == ["conv.weight"]


def test_targets_are_stacks_and_linear_layers_and_no_convolution(part):
    assert [target.name for target in target_weights(part)] == ["proj", *STACKS]


def test_lora_does_not_adapt_a_convolution(part):
    lora.add_adapters(part, LoRA(targets="*", rank=2))
    adapted = {name.split(".lora.")[0] for name, _ in part.named_parameters() if ".lora." in name}
    assert adapted
    assert not any(name.startswith("conv") for name in adapted)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantisation_skips_a_convolution(part, kind):
    before = part.conv.weight.detach().clone()
    quantize(part, kind)
    assert torch.equal(part.conv.weight, before)
    assert nn.utils.parametrize.is_parametrized(part.experts.up_proj)
    assert not nn.utils.parametrize.is_parametrized(part.conv)

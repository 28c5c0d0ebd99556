"""Initialisation: the table of `nn/layers/linear.py`, measured."""

import math

import pytest
import torch

from tinsmith.nn.model import LM, ModelConfig


@pytest.fixture
def lm(section):
    torch.manual_seed(0)
    mixer = {"heads": 8, "kv_heads": 4, "bias": "all", "qk_norm": True}
    return LM(ModelConfig.from_dict(section(mixer, vocab_size=999, dim=256, depth=5)))


def test_projections_have_half_the_variance_preserving_std(lm):
    for block in lm.blocks:
        for weight in (block.mixer.q_proj.weight, block.mixer.v_proj.weight):
            assert weight.std().item() == pytest.approx(0.5 / 16, rel=0.03)
        assert block.feed.up_proj.weight.std().item() == pytest.approx(0.5 / 16, rel=0.03)


def test_residual_projections_shrink_with_depth(lm):
    for block in lm.blocks:
        expected = 0.5 / 16 / math.sqrt(10)
        assert block.mixer.o_proj.weight.std().item() == pytest.approx(expected, rel=0.03)
        expected = 0.5 / math.sqrt(48) / math.sqrt(10)
        assert block.feed.down_proj.weight.std().item() == pytest.approx(expected, rel=0.03)


def test_embedding_and_head_are_small(lm):
    assert lm.embed.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for parameter in lm.parameters():
        assert abs(parameter.mean().item() - round(parameter.mean().item())) < 0.02


def test_biases_are_zero_and_norms_one(lm):
    for name, parameter in lm.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name


def test_the_stream_does_not_grow_with_depth(section):
    """64 blocks leave the hidden state within a factor of three of two blocks."""
    sizes = []
    for depth in (2, 64):
        torch.manual_seed(0)
        lm = LM(ModelConfig.from_dict(section(depth=depth, dim=64)))
        seen = []
        lm.norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        lm(torch.randint(0, 48, (2, 32)))
        sizes.append(seen[0].square().mean().sqrt().item())
    assert sizes[1] < 3 * sizes[0]


def test_equal_seeds_give_equal_weights(section):
    def first(seed):
        torch.manual_seed(seed)
        return LM(ModelConfig.from_dict(section())).state_dict()

    once, again, other = first(0), first(0), first(1)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not torch.equal(once["embed.weight"], other["embed.weight"])

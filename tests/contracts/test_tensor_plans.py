"""Tensor-parallel plans name real linear layers and split them in pairs."""

import pytest
from torch import nn


@pytest.fixture
def plans(make, mixer, feed_forward):
    block = make(mixer=mixer, feed_forward=feed_forward, depth=1).blocks[0]
    return [(part, part.tensor_plan()) for part in (block.mixer, block.feed)]


def test_a_plan_names_linear_layers(plans):
    for part, plan in plans:
        layers = dict(part.named_modules())
        for name, split in plan.items():
            assert isinstance(layers[name], nn.Linear), name
            assert split in ("column", "row")


def test_a_plan_ends_with_a_row_split_and_its_widths_agree(plans):
    """Outputs of column-split layers are the inputs of row-split ones: one all-reduce is enough."""
    for part, plan in plans:
        layers = dict(part.named_modules())
        columns = {layers[name].out_features for name, split in plan.items() if split == "column"}
        rows = {layers[name].in_features for name, split in plan.items() if split == "row"}
        assert bool(columns) == bool(rows)
        assert rows <= columns


def test_common_parts_have_plans(make):
    block = make(depth=1).blocks[0]
    assert set(block.mixer.tensor_plan()) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert set(block.feed.tensor_plan()) == {"gate_proj", "up_proj", "down_proj"}

"""Roles of parameters: every trainable parameter has exactly one, determined by its module."""

from typing import ClassVar

import pytest
import torch
from torch import nn

import tinsmith
from tinsmith.optim.groups import partition


def names(groups, role):
    return {name for name, _ in groups[role]}


def test_every_trainable_parameter_is_in_exactly_one_group(make_model):
    for tied in (True, False):
        model = make_model(tied=tied)
        grouped = [id(p) for named in partition(model).values() for _, p in named]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_roles_follow_the_modules(make_model):
    groups = partition(make_model(tied=False))
    blocks = ("blocks.0.", "blocks.1.")
    inner = ("up.weight", "down.weight", "experts.up", "experts.down")
    assert names(groups, "matrix") == {block + name for block in blocks for name in inner}
    assert names(groups, "head") == {"head.weight"}
    assert names(groups, "router") == {block + "experts.router.gate.weight" for block in blocks}
    mixing = {block + "mixing" for block in blocks}
    assert names(groups, "embedding") == {"embed.weight", "places.weight"} | mixing
    vectors = ("norm.weight", "norm.bias", "up.bias", "temperature", "experts.router.gate.bias")
    value = {"value.weight", "value.bias"}
    assert names(groups, "vector") == value | {block + n for block in blocks for n in vectors}


def test_a_tied_head_is_the_embedding_once_under_its_first_name(make_model):
    model = make_model(tied=True)
    groups = partition(model)
    assert names(groups, "head") == set()
    assert dict(groups["embedding"])["head.weight"] is model.embed.weight
    assert "embed.weight" not in names(groups, "embedding")


def test_frozen_parameters_have_no_role(make_model):
    model = make_model()
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad = False
    everyone = {name for named in partition(model).values() for name, _ in named}
    assert everyone == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("blocks.0") for name in everyone)


def test_the_innermost_declared_role_applies():
    class Inner(nn.Module):
        ROLE: ClassVar[str] = "matrix"

        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 4))

    class Outer(nn.Module):
        ROLE: ClassVar[str] = "router"

        def __init__(self):
            super().__init__()
            self.inner = Inner()
            self.plain = nn.Sequential(nn.Linear(4, 4))

    groups = partition(Outer())
    assert names(groups, "matrix") == {"inner.table"}
    assert names(groups, "router") == {"plain.0.weight"}


def test_conflicting_roles_of_a_shared_parameter_are_refused():
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Embedding(4, 4)})
    module["a"].weight = module["b"].weight
    with pytest.raises(ValueError, match=r"a\.weight is shared .* embedding, matrix"):
        partition(module)


def test_muon_gets_exactly_the_block_matrices_of_the_26m_preset():
    with torch.device("meta"):
        model = tinsmith.LM(tinsmith.ModelConfig.preset("minimind2-26m"))
    groups = partition(model)
    assert len(groups["matrix"]) == 8 * 7
    assert all(name.startswith("blocks.") for name in names(groups, "matrix"))
    assert len(groups["embedding"]) == 1
    assert groups["head"] == groups["router"] == []
    assert sum(p.numel() for named in groups.values() for _, p in named) == 25_829_888

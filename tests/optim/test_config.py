"""The `optim:` section: accepted values, and one line for invalid ones."""

import pytest

from tinsmith.core.errors import UserError
from tinsmith.core.parse import parse, to_plain
from tinsmith.optim.config import (
    WSD,
    AdamWConfig,
    Constant,
    Cosine,
    MuonConfig,
    OptimConfig,
)

RECIPE = {
    "matrices": {"kind": "muon", "lr": 0.02, "momentum": 0.95},
    "others": {"kind": "adamw", "lr": "3.0e-3", "betas": [0.9, 0.95]},
    "schedule": {"kind": "wsd", "warmup": 100, "decay": 0.3},
    "max_grad_norm": 1.0,
}


def test_the_documented_recipe_is_the_default():
    assert parse(OptimConfig, RECIPE) == parse(OptimConfig, {}) == OptimConfig()


@pytest.mark.parametrize(
    "config",
    [
        OptimConfig(),
        OptimConfig(matrices=AdamWConfig(lr=1e-3, decay="all"), schedule=Constant(warmup=3)),
        OptimConfig(
            matrices=MuonConfig(scale="match_rms_adamw"), schedule=Cosine(), max_grad_norm=None
        ),
    ],
)
def test_configs_round_trip_through_yaml(config):
    assert parse(OptimConfig, to_plain(config)) == config


def test_counts_accept_suffixes_and_exponents():
    assert parse(OptimConfig, {"schedule": {"kind": "wsd", "warmup": "2k"}}).schedule == WSD(
        warmup=2000
    )


@pytest.mark.parametrize(
    ("data", "output"),
    [
        ({"matrices": {"kind": "muon", "lr": -1}}, "r.yaml: matrices: lr=-1.0 must be"),
        ({"matrices": {"kind": "muon", "lr": "nan"}}, "matrices.lr: Input should be a finite"),
        ({"matrices": {"kind": "muon", "momentum": 1}}, "r.yaml: matrices: momentum=1.0 must be"),
        ({"matrices": {"kind": "muon", "ns_steps": 0}}, "r.yaml: matrices: ns_steps=0 must be"),
        ({"matrices": {"kind": "moun"}}, "r.yaml: matrices.kind: 'moun' is not one of muon, adamw"),
        ({"matrices": {"kind": "muon", "lrr": 1}}, "r.yaml: matrices.lrr: unknown key. Did you"),
        ({"others": {"betas": [0.9, 1.5]}}, "r.yaml: others: betas[1]=1.5 must be"),
        ({"others": {"eps": 0}}, "r.yaml: others: eps=0.0 must be above 0"),
        ({"others": {"weight_decay": -0.1}}, "r.yaml: others: weight_decay=-0.1 must be"),
        (
            {"schedule": {"kind": "wsd", "decay": 1.5}},
            "r.yaml: schedule: decay=1.5 must be a fraction",
        ),
        (
            {"schedule": {"kind": "wsd", "warmup": -1}},
            "r.yaml: schedule: warmup=-1 must be a number",
        ),
        (
            {"schedule": {"kind": "cosine", "min_lr_ratio": 2}},
            "r.yaml: schedule: min_lr_ratio=2.0 must be a fraction",
        ),
        ({"max_grad_norm": 0}, "r.yaml: max_grad_norm=0.0 must be above 0"),
    ],
)
def test_invalid_values_are_named_in_one_line(data, output):
    with pytest.raises(UserError) as error:
        parse(OptimConfig, data, "r.yaml")
    assert output in str(error.value)
    assert "\n" not in str(error.value)

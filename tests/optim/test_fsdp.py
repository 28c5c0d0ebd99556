"""Optimizers with FSDP2-sharded parameters equal a single process in steps and saved state."""

from pathlib import Path

import pytest
import torch

from tests.ranks import run

WORKER = Path(__file__).with_name("fsdp_worker.py")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(WORKER, 1, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_fsdp_equals_a_single_process(alone, tmp_path, world):
    spread = run(WORKER, world, tmp_path)
    assert spread.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(spread[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


def test_reset_rows_are_zero_and_the_others_are_not(alone):
    momentum = alone["state/blocks.0.experts|momentum"]
    assert not momentum[[0, 2]].any()
    assert momentum[1].all()
    assert not alone["state/embed.weight|exp_avg"][5].any()

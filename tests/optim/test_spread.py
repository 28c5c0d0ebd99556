"""Spread over ranks by FSDP2, the optimizers make the steps, and the state, of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("spread_worker.py")


def run(world: int, folder: Path) -> dict[str, torch.Tensor]:
    root = str(WORKER.parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(world), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(said)
    return load_file(folder / f"{world}.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(1, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("world", [2, 3])
def test_fsdp_equals_a_single_process(alone, tmp_path, world):
    spread = run(world, tmp_path)
    assert spread.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(spread[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


def test_forgotten_rows_are_zero_and_the_others_are_not(alone):
    momentum = alone["state/blocks.0.experts|momentum"]
    assert not momentum[[0, 2]].any()
    assert momentum[1].all()
    assert not alone["state/embed.weight|exp_avg"][5].any()

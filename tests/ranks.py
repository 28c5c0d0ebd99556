"""A worker script as several gloo processes, and what the first of them wrote."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def run(worker: Path, world: int, folder: Path) -> dict[str, torch.Tensor]:
    """Run `worker RANK WORLD FOLDER` for every rank; all must end well. The tensors that it left in
    FOLDER/WORLD.safetensors.
    """
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(world), str(folder)],
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

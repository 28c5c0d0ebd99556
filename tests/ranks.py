"""A worker script as several gloo processes, and what the first of them wrote."""

import os
import socket
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests import warm


def ranks_environment(world: int) -> list[dict[str, str]]:
    """What tells each of `world` processes who it is and where they meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def run(worker: Path, world: int, folder: Path) -> dict[str, torch.Tensor]:
    """Run `worker RANK WORLD FOLDER` for every rank; all must end well. The tensors that it left in
    FOLDER/WORLD.safetensors.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        warm.Process((rank, world, folder), environment, folder, program=(worker,))
        for rank in range(world)
    ]
    output = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(output)
    return load_file(folder / f"{world}.safetensors")

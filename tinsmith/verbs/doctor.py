"""`tinsmith doctor`: report versions, device, speed and disk of this machine."""

import importlib.util
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import tinsmith
from tinsmith.core.files import free_space
from tinsmith.core.log import print_line
from tinsmith.core.units import format_size
from tinsmith.train.parallel import pick_device
from tinsmith.train.run_dir import runs_root

OPTIONAL = {
    "transformers": "hub",
    "datasets": "hub",
    "tensorboard": "track",
    "wandb": "track",
    "trackio": "track",
}


def doctor(as_json: bool) -> None:
    """Print the facts about this machine, and hints."""
    facts = collect_facts()
    if as_json:
        print_line(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        print_line(f" {name:<18} {value}")
    for hint in give_advice(facts):
        print_line(f" hint   {hint}")


def collect_facts() -> dict[str, Any]:
    """Collect versions, device, speed of matrix products, free disk and optional packages."""
    device = pick_device("auto")
    speeds = {name: matmul_speed(device, dtype) for name, dtype in _dtypes(device).items()}
    return {
        "tinsmith": tinsmith.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "device": str(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **{f"{name} GFLOP/s": round(speed) for name, speed in speeds.items()},
        "runs": str(runs_root().resolve()),
        "writable": os.access(_nearest_existing_folder(runs_root()), os.W_OK),
        "disk free": format_size(free_space(runs_root().resolve())),
        "optional missing": [name for name in OPTIONAL if importlib.util.find_spec(name) is None],
    }


def give_advice(facts: dict[str, Any]) -> list[str]:
    """Return one hint per problem in the facts."""
    hints = []
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        hints.append(f"Python {facts['python']} is untested; 3.11 to 3.13 are")
    if not facts["writable"]:
        hints.append(f"{facts['runs']} is not writable: set TINSMITH_RUNS")
    for name in facts["optional missing"]:
        hints.append(
            f'{name} is not installed: pip install "tinsmith[{OPTIONAL[name]}]" if you want it'
        )
    return hints


def matmul_speed(device: torch.device, dtype: torch.dtype, width: int = 1024) -> float:
    """Measure the GFLOP/s of a square matrix product and return the best_seconds of a few runs."""
    a = torch.randn(width, width, device=device).to(dtype)
    best_seconds = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        (a @ a).sum().item()
        best_seconds = min(best_seconds, time.perf_counter() - start)
    return 2 * width**3 / best_seconds / 1e9


def _dtypes(device: torch.device) -> dict[str, torch.dtype]:
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return dtypes if device.type == "cpu" else dtypes | {"fp16": torch.float16}


def _nearest_existing_folder(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path

"""`tinsmith doctor`: report versions, device, speed and disk of this machine."""

import importlib.util
import json
import os
import platform
import sys
import time
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
    """Print the facts about this machine, then advice."""
    facts = collect_facts()
    if as_json:
        print_line(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        print_line(f" {name:<18} {value}")
    for advice in give_advice(facts):
        print_line(f" hint   {advice}")


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
        "writable": os.access(_existing(runs_root()), os.W_OK),
        "disk free": format_size(free_space(runs_root().resolve())),
        "optional missing": [name for name in OPTIONAL if importlib.util.find_spec(name) is None],
    }


def give_advice(facts: dict[str, Any]) -> list[str]:
    """Return one line of advice per problem in the facts."""
    hints = []
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        hints.append(f"Python {facts['python']} is untested; 3.11 to 3.13 are")
    bf16, fp32 = facts.get("bf16 GFLOP/s", 0), facts["fp32 GFLOP/s"]
    if bf16 < fp32:
        hints.append("bf16 is slower than fp32 on this device: train with train.precision=fp32")
    if not facts["writable"]:
        hints.append(f"{facts['runs']} is not writable: set TINSMITH_RUNS")
    for name in facts["optional missing"]:
        hints.append(
            f'{name} is not installed: pip install "tinsmith[{OPTIONAL[name]}]" if you want it'
        )
    return hints


def matmul_speed(device: torch.device, dtype: torch.dtype, width: int = 1024) -> float:
    """Measure GFLOP/s of a square matrix product, the best of a few runs."""
    a = torch.randn(width, width, device=device).to(dtype)
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - began)
    return 2 * width**3 / best / 1e9


def _dtypes(device: torch.device) -> dict[str, torch.dtype]:
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return {name: dtype for name, dtype in known.items() if name != "fp16" or device.type != "cpu"}


def _existing(path: Any) -> Any:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path

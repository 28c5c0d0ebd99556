"""Random numbers: generators that are a pure function of a seed and some keys, and whole states
for checkpoints.
"""

import hashlib
import random

import numpy as np
import torch
from torch import Tensor


def derive(seed: int, *keys: int | str) -> int:
    """A 63-bit seed made from `seed` and `keys`; different keys give unrelated streams."""
    text = "/".join([str(seed), *map(str, keys)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator that depends on nothing but its arguments."""
    made = torch.Generator(device=device)
    made.manual_seed(derive(seed, *keys))
    return made


def seed_all(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture() -> tuple[dict[str, Tensor], dict[str, object]]:
    """The global random states: tensors (torch, one per CUDA device) and JSON-ready values
    (python, numpy).
    """
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    values: dict[str, object] = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
    }
    return tensors, values


def restore(tensors: dict[str, Tensor], values: dict[str, object]) -> None:
    """Put back what `capture` took. CUDA states are restored where the devices exist."""
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for i in range(
            min(torch.cuda.device_count(), sum(name.startswith("cuda.") for name in tensors))
        ):
            torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
    version, numbers, gauss = values["python"]  # type: ignore[misc]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = values["numpy"]  # type: ignore[misc]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))

"""Random seeds and generators derived from a seed and keys, and RNG states for checkpoints."""

import hashlib
import random
from typing import cast

import numpy as np
import torch
from torch import Tensor


def derive_seed(seed: int, *keys: int | str) -> int:
    """Derive a 63-bit seed from `seed` and `keys`. Different keys give independent streams."""
    text = "/".join([str(seed), *map(str, keys)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def make_generator(
    seed: int, *keys: int | str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Make a torch generator seeded by `derive_seed`."""
    generator = torch.Generator(device=device)
    generator.manual_seed(derive_seed(seed, *keys))
    return generator


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]


def capture() -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return the global RNG states: tensors (torch, each CUDA device) and JSON values (Python,
    numpy).
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
    """Restore the states that `capture` returned, CUDA states only on devices that exist."""
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for i in range(
            min(torch.cuda.device_count(), sum(name.startswith("cuda.") for name in tensors))
        ):
            torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
    version, numbers, gauss = cast("tuple[int, list[int], float | None]", values["python"])
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = cast(
        "tuple[str, list[int], int, int, float]", values["numpy"]
    )
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))

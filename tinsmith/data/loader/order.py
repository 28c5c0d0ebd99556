"""The order of samples: a keyed bijection on [0, size) that needs no memory and can start anywhere.

A Feistel network over the smallest even number of bits that holds `size` is a bijection whatever
its round function; places beyond `size` are walked through the network again until they fall inside
(Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, section 4). So the shuffled order
of an epoch is a pure function of (seed, index), and the whole state of a data source is one
integer.
"""

import numpy as np
from numpy.typing import NDArray

from tinsmith.core.rng import derive_seed

ROUNDS = 8
_ONE = np.uint64(1)


def permute(index: int, size: int, seed: int, *keys: int | str) -> int:
    """Where the keyed permutation of [0, size) sends `index`. Raises IndexError outside of it."""
    return int(permute_many(np.array([index]), size, seed, *keys)[0])


def permute_many(
    indices: NDArray[np.int64], size: int, seed: int, *keys: int | str
) -> NDArray[np.int64]:
    """`permute` for many indices (n,) at once; memory grows with n alone, never with `size`."""
    if len(indices) and (indices.min() < 0 or indices.max() >= size):
        raise IndexError(f"index outside of [0, {size})")
    half = max(2, ((size - 1).bit_length() + 1) // 2)
    round_keys = _mix(
        np.uint64(derive_seed(seed, *keys)) + np.arange(1, ROUNDS + 1, dtype=np.uint64)
    )
    places = indices.astype(np.uint64)
    outside = np.arange(len(places))
    while len(outside):
        places[outside] = _encrypt(places[outside], half, round_keys)
        outside = outside[places[outside] >= np.uint64(size)]
    return places.astype(np.int64)


def order(seed: int, index: int, size: int, *keys: int | str) -> tuple[int, int]:
    """(epoch, place) of the `index`-th sample of an endless pass over [0, size), shuffled anew in
    every epoch."""
    epoch, step = divmod(index, size)
    return epoch, permute(step, size, seed, *keys, epoch)


def order_many(
    seed: int, indices: NDArray[np.int64], size: int, *keys: int | str
) -> NDArray[np.int64]:
    """The places of `order` for many indices (n,), which may lie in several epochs."""
    epochs, steps = np.divmod(indices, size)
    places = np.empty_like(steps)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        places[chosen] = permute_many(steps[chosen], size, seed, *keys, int(epoch))
    return places


def _encrypt(
    places: NDArray[np.uint64], half: int, round_keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half), (_ONE << np.uint64(half)) - _ONE
    left, right = places >> shift, places & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every output bit depends on every
    input bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))

"""Shuffling: a keyed permutation of [0, size) that needs no memory and can start at any index.

A Feistel network is a bijection whatever its round function. It works on the smallest even number
of bits that holds `size`; outputs of `size` or more are passed through the network again until they
are below (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002,
section 4). So the shuffled order of an epoch is a pure function of (seed, index), and the state of
a data source is a single integer.
"""

import numpy as np
from numpy.typing import NDArray

from tinsmith.core.rng import derive_seed

ROUNDS = 8
_ONE = np.uint64(1)


def permute(index: int, size: int, seed: int, *keys: int | str) -> int:
    """Return the image of `index` under the keyed permutation of [0, size). Raise IndexError if
    `index` is outside of it.
    """
    return int(permute_many(np.array([index]), size, seed, *keys)[0])


def permute_many(
    indices: NDArray[np.int64], size: int, seed: int, *keys: int | str
) -> NDArray[np.int64]:
    """Permute many indices (n,) at once. Memory grows with n, not with `size`."""
    if len(indices) and (indices.min() < 0 or indices.max() >= size):
        raise IndexError(f"index outside of [0, {size})")
    half = max(2, ((size - 1).bit_length() + 1) // 2)
    round_keys = _mix(
        np.uint64(derive_seed(seed, *keys)) + np.arange(1, ROUNDS + 1, dtype=np.uint64)
    )
    permuted = indices.astype(np.uint64)
    outside = np.arange(len(permuted))
    while len(outside):
        permuted[outside] = _encrypt(permuted[outside], half, round_keys)
        outside = outside[permuted[outside] >= np.uint64(size)]
    return permuted.astype(np.int64)


def order(seed: int, index: int, size: int, *keys: int | str) -> tuple[int, int]:
    """Return (epoch, sample index) of the `index`-th sample of an endless pass over [0, size) that
    is shuffled anew in every epoch.
    """
    epoch, step = divmod(index, size)
    return epoch, permute(step, size, seed, *keys, epoch)


def order_many(
    seed: int, indices: NDArray[np.int64], size: int, *keys: int | str
) -> NDArray[np.int64]:
    """Return the sample indices of `order` for many indices (n,), which may lie in several
    epochs.
    """
    epochs, steps = np.divmod(indices, size)
    sample_indices = np.empty_like(steps)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        sample_indices[in_epoch] = permute_many(steps[in_epoch], size, seed, *keys, int(epoch))
    return sample_indices


def _encrypt(
    values: NDArray[np.uint64], half: int, round_keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Apply the Feistel network to values (n,) of 2 * `half` bits."""
    shift, mask = np.uint64(half), (_ONE << np.uint64(half)) - _ONE
    left, right = values >> shift, values & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finaliser of SplitMix64 (Steele, Lea and Flood 2014): every output bit depends on
    every input bit.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))

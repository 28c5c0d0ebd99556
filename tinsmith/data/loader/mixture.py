"""Which source each global sample comes from, when several are mixed by weight.

The endless order is cut in blocks of 1000 samples. Every block holds each source's exact quota (its
share by weight, rounded by the largest remainder, at least one), in an order shuffled by a keyed
permutation. So the number of samples that any source has given before sample i follows from i
alone: full blocks times quota, plus a count inside one block.
"""

import numpy as np
from numpy.typing import NDArray

from tinsmith.data.loader.order import permute_many

BLOCK_SIZE = 1000


class Mixture:
    """A deterministic interleaving of sources by weight."""

    def __init__(self, weights: list[float], seed: int):
        self.quotas = quotas(weights)
        self._seed = seed
        self._ends = np.cumsum(self.quotas)

    def locate(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For global samples (n,): which source each is from (n,), and its number within that
        source (n,)."""
        sources, numbers = np.empty_like(indices), np.empty_like(indices)
        blocks, places = np.divmod(indices, BLOCK_SIZE)
        for block in np.unique(blocks):
            here = blocks == block
            order, earlier = self._block(int(block))
            chosen = order[places[here]]
            sources[here] = chosen
            numbers[here] = block * self.quotas[chosen] + earlier[places[here]]
        return sources, numbers

    def cursors(self, index: int) -> NDArray[np.int64]:
        """How many samples each source (sources,) has given before global sample `index`."""
        block, place = divmod(index, BLOCK_SIZE)
        order, _ = self._block(block)
        return block * self.quotas + np.bincount(order[:place], minlength=len(self.quotas))

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each of a block's samples, and how many of that source come before it in
        the block."""
        slots = permute_many(np.arange(BLOCK_SIZE), BLOCK_SIZE, self._seed, "mixture", block)
        order = np.searchsorted(self._ends, slots, side="right")
        earlier = np.empty_like(order)
        for source in range(len(self.quotas)):
            here = order == source
            earlier[here] = np.arange(here.sum())
        return order, earlier


def quotas(weights: list[float]) -> NDArray[np.int64]:
    """Samples per block of each source (sources,), summing to BLOCK. At most BLOCK sources, weights
    above zero."""
    assert 0 < len(weights) <= BLOCK_SIZE
    exact = np.array(weights, dtype=np.float64) / sum(weights) * BLOCK_SIZE
    whole = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(whole - exact, kind="stable")
    whole[by_remainder[: BLOCK_SIZE - whole.sum()]] += 1
    for source in np.flatnonzero(whole == 0):
        whole[source] += 1
        whole[whole.argmax()] -= 1
    return whole

"""Deterministic mixing of data sources by weight.

The endless order of samples is divided into blocks of 1000. Every block contains each source's
exact quota (its share by weight, rounded by the largest remainder, at least one), in an order
shuffled by a keyed permutation. So the number of samples of a source before global sample i is a
function of i alone: full blocks times quota, plus a count inside one block.
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
        """Return the source (n,) of global samples (n,), and their index within that source (n,),
        which counts on over all epochs.
        """
        sources, source_indices = np.empty_like(indices), np.empty_like(indices)
        blocks, offsets = np.divmod(indices, BLOCK_SIZE)
        for block in np.unique(blocks):
            in_block = blocks == block
            block_sources, num_earlier = self._block(int(block))
            selected = block_sources[offsets[in_block]]
            sources[in_block] = selected
            source_indices[in_block] = (
                block * self.quotas[selected] + num_earlier[offsets[in_block]]
            )
        return sources, source_indices

    def cursors(self, index: int) -> NDArray[np.int64]:
        """Return the number of samples of each source (sources,) before global sample `index`."""
        block, offset = divmod(index, BLOCK_SIZE)
        block_sources, _ = self._block(block)
        counts = np.bincount(block_sources[:offset], minlength=len(self.quotas))
        return block * self.quotas + counts

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the source of each sample of a block, and the number of samples of that source
        before it in the block. Both are (BLOCK_SIZE,).
        """
        permuted = permute_many(np.arange(BLOCK_SIZE), BLOCK_SIZE, self._seed, "mixture", block)
        sources = np.searchsorted(self._ends, permuted, side="right")
        num_earlier = np.empty_like(sources)
        for source in range(len(self.quotas)):
            of_source = sources == source
            num_earlier[of_source] = np.arange(of_source.sum())
        return sources, num_earlier


def quotas(weights: list[float]) -> NDArray[np.int64]:
    """Return the number of samples per block of each source (sources,); they sum to BLOCK_SIZE.

    There may be at most BLOCK_SIZE sources, and weights must be positive.
    """
    assert 0 < len(weights) <= BLOCK_SIZE
    exact = np.array(weights, dtype=np.float64) / sum(weights) * BLOCK_SIZE
    whole = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(whole - exact, kind="stable")
    whole[by_remainder[: BLOCK_SIZE - whole.sum()]] += 1
    for source in np.flatnonzero(whole == 0):
        whole[source] += 1
        whole[whole.argmax()] -= 1
    return whole

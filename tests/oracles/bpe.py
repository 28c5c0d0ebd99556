"""Byte-pair encoding the slow way, to be read: Sennrich et al. 2016, arXiv:1508.07909.

Symbols are ids. Those below `first` are taken; a merge of two symbols gets the next free id. Ties
go to the pair that is smaller as a tuple of ids. Words are never merged across.
"""

import itertools
from collections import Counter

Word = tuple[int, ...]
Pair = tuple[int, int]


def train(words: list[Word], first: int, merges: int) -> list[Pair]:
    """The first `merges` merges, most frequent pair first; fewer where nothing is left to merge."""
    counts = Counter(words)
    learned: list[Pair] = []
    while len(learned) < merges:
        pairs: Counter[Pair] = Counter()
        for word, count in counts.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        new = first + len(learned)
        learned.append(best)
        merged: Counter[Word] = Counter()
        for word, count in counts.items():
            merged[merge(word, best, new)] += count
        counts = merged
    return learned


def encode(word: Word, learned: list[Pair], first: int) -> Word:
    """Apply the merges in the order in which they were learned."""
    for place, pair in enumerate(learned):
        word = merge(word, pair, first + place)
    return word


def merge(word: Word, pair: Pair, new: int) -> Word:
    """Replace every occurrence of `pair`, from the left, by `new`."""
    out: list[int] = []
    place = 0
    while place < len(word):
        if word[place : place + 2] == pair:
            out.append(new)
            place += 2
        else:
            out.append(word[place])
            place += 1
    return tuple(out)

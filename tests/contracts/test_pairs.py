"""Mixers with feed-forwards: what one chooses must not reach what the other promises.

Every mixer meets one routed feed-forward, every feed-forward one mixer; `make test-all` has all
pairs.
"""

import pytest
import torch

from tests.oracles.close import close_to

close = close_to(1e-10)


@pytest.fixture
def lm(make, mixer, feed_forward):
    return make(mixer=mixer, feed_forward=feed_forward, depth=2)


@torch.no_grad()
def test_causality(lm, draw):
    """To 1e-10: how many tokens an expert is given depends on later ones."""
    ids = draw(2, 21)
    before = lm(ids).logits
    for last in (0, 4, 11, 19):
        changed = ids.clone()
        changed[:, last + 1 :] = (ids[:, last + 1 :] + 7) % 48
        close(lm(changed).logits[:, : last + 1], before[:, : last + 1])


@torch.no_grad()
def test_decoding_equals_the_full_forward(lm, draw):
    ids = draw(2, 17)
    caches, found = lm.new_caches(2, 17), []
    for part in ids.split([9, 1, 1, 1, 5], 1):
        found.append(lm(part, caches=caches).logits)
    close(torch.cat(found, 1), lm(ids).logits)


@torch.no_grad()
def test_packed_and_padded_documents_equal_separate_ones(lm, draw):
    segments = torch.tensor([[-1] * 2 + [4] * 7 + [0] * 5 + [-1] * 3])
    ids = draw(1, 17)
    found = lm(ids, segments=segments)
    assert found.logits.isfinite().all()
    parts = [lm(ids[:, begin:end]) for begin, end in ((2, 9), (9, 14))]
    close(found.logits[:, 2:14], torch.cat([part.logits for part in parts], 1))
    for name, value in found.stats.items():
        close(value, sum(part.stats[name] for part in parts))


def test_checkpointed_gradients_are_equal_to_the_bit(lm, draw):
    lm.train()
    segments = torch.tensor([[-1] * 2 + [0] * 10, [1] * 5 + [0] * 7])
    gradients, stats = [], []
    for checkpointing in (False, True):
        lm.zero_grad()
        lm.activation_checkpointing = checkpointing
        out = lm(draw(2, 12), segments=segments)
        (out.logits[segments >= 0].square().sum() + sum(out.losses.values())).backward()
        gradients.append([parameter.grad for parameter in lm.parameters()])
        stats.append(out.stats)
    assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))
    assert all(torch.equal(value, stats[1][name]) for name, value in stats[0].items())

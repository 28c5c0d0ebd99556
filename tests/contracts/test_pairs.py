"""Every mixer with a mixture of experts, every feed-forward with one mixer, and combinations of all
three slots: selections in one slot do not break the guarantees of another.
"""

import pytest
import torch

from tests.contracts.checks import (
    assert_causal,
    assert_checkpointing_changes_no_gradient,
    close,
    decode,
)


@pytest.fixture
def lm(make, mixer, feed_forward):
    return make(mixer=mixer, feed_forward=feed_forward, depth=2)


@torch.no_grad()
def test_logits_do_not_depend_on_later_tokens(lm, draw):
    """To 1e-10, because the number of tokens of an expert depends on later tokens."""
    assert_causal(lm, draw(2, 21), (0, 4, 11, 19))


@torch.no_grad()
def test_decoding_equals_the_full_forward(lm, draw):
    ids = draw(2, 17)
    close(decode(lm, ids, [9, 1, 1, 1, 5]), lm(ids).logits)


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


def test_checkpointing_changes_no_gradient(lm, draw):
    segments = torch.tensor([[-1] * 2 + [0] * 10, [1] * 5 + [0] * 7])
    assert_checkpointing_changes_no_gradient(lm, draw(2, 12), segments)

"""What training says about every mixer: it can learn, and it cannot look ahead."""

import math

import pytest
import torch
import torch.nn.functional as F

SYMBOLS = 8


def steps(lm, batches, rate):
    """Train with AdamW on (ids, segments) batches; yields each step's mean next-token loss."""
    optimizer = torch.optim.AdamW(lm.train().parameters(), rate, weight_decay=0.0)
    for ids, segments in batches:
        out = lm(ids, segments=segments)
        same = segments[:, 1:] == segments[:, :-1]
        loss = F.cross_entropy(out.logits[:, :-1][same], ids[:, 1:][same])
        (loss + sum(out.losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


@pytest.mark.costly
def test_random_tokens_are_never_predicted_better_than_chance(make, mixer, residual):
    """Fresh uniform tokens carry nothing: a loss below ln V is a leak from the future.

    Two documents a row: what crosses their border would not help, what looks ahead would. The
    second is long enough for every mixer that chooses to leave something out.
    """
    lm = make(
        mixer=mixer,
        residual=residual,
        depth=2,
        vocab_size=SYMBOLS,
        dtype=torch.float32,
        stirred=False,
    )
    source = torch.Generator().manual_seed(0)
    segments = torch.tensor([[0] * 7 + [1] * 25]).expand(32, -1)
    batches = ((torch.randint(0, SYMBOLS, (32, 32), generator=source), segments) for _ in range(80))
    losses = list(steps(lm, batches, 1e-2))
    assert sum(losses[-20:]) / 20 > math.log(SYMBOLS) - 0.005


def test_a_single_batch_is_learned_by_heart(make, mixer, residual, draw):
    lm = make(mixer=mixer, residual=residual, depth=2, dtype=torch.float32, stirred=False)
    ids, segments = draw(4, 16), torch.zeros(4, 16, dtype=torch.long)
    losses = []
    for loss in steps(lm, ((ids, segments) for _ in range(300)), 1e-2):
        losses.append(loss)
        if loss < 0.05:
            break
    assert losses[0] == pytest.approx(math.log(48), rel=0.05)
    assert losses[-1] < 0.05

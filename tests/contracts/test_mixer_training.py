"""Training every mixer: it can fit a batch, and it cannot predict random tokens."""

import math

import pytest
import torch
import torch.nn.functional as F

SYMBOLS = 8


def train(lm, batches, lr):
    """Train with AdamW on (ids, segments) batches; yield the mean next-token loss of each step."""
    optimizer = torch.optim.AdamW(lm.train().parameters(), lr, weight_decay=0.0)
    for ids, segments in batches:
        out = lm(ids, segments=segments)
        same = segments[:, 1:] == segments[:, :-1]
        loss = F.cross_entropy(out.logits[:, :-1][same], ids[:, 1:][same])
        (loss + sum(out.losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


@pytest.mark.costly
def test_random_tokens_cannot_be_predicted(make, mixer, residual):
    """Uniform random tokens cannot be predicted, so a loss below ln V means that a query attends to
    later tokens.

    A row has two documents. The second is longer than what any selective mixer selects.
    """
    lm = make(
        mixer=mixer,
        residual=residual,
        depth=2,
        vocab_size=SYMBOLS,
        dtype=torch.float32,
        perturbed=False,
    )
    source = torch.Generator().manual_seed(0)
    segments = torch.tensor([[0] * 7 + [1] * 25]).expand(32, -1)
    batches = ((torch.randint(0, SYMBOLS, (32, 32), generator=source), segments) for _ in range(80))
    losses = list(train(lm, batches, 1e-2))
    assert sum(losses[-20:]) / 20 > math.log(SYMBOLS) - 0.005


def test_a_single_batch_is_overfitted(make, mixer, residual, draw):
    lm = make(mixer=mixer, residual=residual, depth=2, dtype=torch.float32, perturbed=False)
    ids, segments = draw(4, 16), torch.zeros(4, 16, dtype=torch.long)
    losses = []
    for loss in train(lm, ((ids, segments) for _ in range(300)), 1e-2):
        losses.append(loss)
        if loss < 0.05:
            break
    assert losses[0] == pytest.approx(math.log(48), rel=0.05)
    assert losses[-1] < 0.05

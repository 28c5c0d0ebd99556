"""What every feed-forward must hold: each token is worked on alone, and padding not at all."""

import pytest
import torch
import torch.nn.functional as F

from tests.oracles.close import close_to
from tinsmith.nn.contract import Ctx

close = close_to(1e-10)

TOKENS = 12


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def lm(make, feed_forward):
    return make(feed_forward=feed_forward)


@pytest.fixture
def x():
    return torch.randn(
        3, TOKENS, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def everywhere(x, segments=None):
    return Ctx(torch.arange(x.shape[1]).expand(x.shape[:2]), segments)


def test_each_token_is_worked_on_alone(lm, x):
    """In any order, in any company, with the same result."""
    feed = lm.blocks[0].feed
    whole = feed(x, everywhere(x)).y
    assert whole.shape == x.shape
    for t in range(TOKENS):
        part = x[:, t : t + 1]
        close(feed(part, everywhere(part)).y, whole[:, t : t + 1])
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))
    mixed = x[:, order]
    close(feed(mixed, everywhere(mixed)).y, whole[:, order])
    close(feed(x.flip(0), everywhere(x)).y.flip(0), whole)


def test_padding_changes_no_token_loss_or_statistic(lm, x):
    feed = lm.blocks[0].feed.train()
    segments = torch.full((3, TOKENS), 0)
    alone = feed(x, everywhere(x, segments))
    wider = torch.cat((torch.full_like(x, 50.0), x), 1)
    padding = torch.cat((torch.full_like(segments, -1), segments), 1)
    found = feed(wider, everywhere(wider, padding))
    assert found.y.isfinite().all()
    close(found.y[:, TOKENS:], alone.y)
    close(found.losses, alone.losses)
    close(found.stats, alone.stats)


def test_it_depends_on_its_input(lm, x):
    feed = lm.blocks[0].feed
    moved = (feed(x, everywhere(x)).y - feed(2 * x, everywhere(x)).y).abs().amax(-1)
    assert (moved > 1e-3).all()


def test_causality_in_the_model(lm, draw):
    ids = draw(2, 33)
    before = lm(ids).logits
    for last in (0, 4, 16, 31):
        changed = ids.clone()
        changed[:, last + 1 :] = (ids[:, last + 1 :] + 7) % 48
        close(lm(changed).logits[:, : last + 1], before[:, : last + 1])


def test_decoding_equals_the_full_forward(lm, draw):
    ids = draw(3, 20)
    expected = lm(ids).logits
    for splits in ([1] * 20, [7, 1, 12]):
        caches = lm.new_caches(3, 20)
        begin, found = 0, []
        for length in splits:
            found.append(lm(ids[:, begin : begin + length], caches=caches).logits)
            begin += length
        close(torch.cat(found, 1), expected)


def test_packed_and_padded_rows_equal_separate_ones(lm, draw):
    segments = torch.tensor([[-1] * 2 + [4] * 7 + [0] * 5 + [-1] * 3])
    ids = draw(1, 17)
    found = lm(ids, segments=segments).logits
    assert found.isfinite().all()
    for begin, end in ((2, 9), (9, 14)):
        close(found[:, begin:end], lm(ids[:, begin:end]).logits)


def test_every_parameter_gets_a_gradient(make, feed_forward, draw):
    lm = make(feed_forward=feed_forward, stirred=False).train()
    with torch.enable_grad():
        out = lm(draw(8, 33))
        targets = draw(8, 33, seed=2)
        loss = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
        (loss + sum(out.losses.values())).backward()
    for name, parameter in lm.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-9, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_gradients_are_equal_to_the_bit(make, feed_forward, draw, dropout):
    shares = dict.fromkeys(("embedding", "attention", "residual"), dropout)
    gradients = []
    for checkpointing in (False, True):
        lm = make(feed_forward=feed_forward, dropout=shares).train()
        lm.activation_checkpointing = checkpointing
        torch.manual_seed(3)
        with torch.enable_grad():
            out = lm(draw(2, 9))
            (out.logits.square().sum() + sum(out.losses.values())).backward()
        gradients.append([parameter.grad for parameter in lm.parameters()])
    assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_is_close_to_full(make, choosers, feed_forward, draw, dtype, bound):
    """The error of the hidden states (root mean square 1), under autocast and with cast weights.
    Where rounding may turn a choice, of the better three quarters of the tokens.
    """

    def error(hidden):
        each = (hidden.float() - expected).square().mean(-1).flatten()
        kept = 3 * len(each) // 4 if feed_forward["kind"] in choosers else len(each)
        return each.sort().values[:kept].mean().sqrt()

    ids = draw(2, 33)
    full = make(feed_forward=feed_forward, dtype=torch.float32, stirred=False)
    expected = full(ids).hidden
    with torch.autocast("cpu", dtype):
        mixed = full(ids).hidden
    cast = make(feed_forward=feed_forward, dtype=dtype, stirred=False)(ids).hidden
    assert error(mixed) < bound
    assert error(cast) < bound


def test_it_builds_without_memory_and_counts_its_work(make, feed_forward):
    with torch.device("meta"):
        lm = make(feed_forward=feed_forward, stirred=False)
    assert all(parameter.is_meta for parameter in lm.parameters())
    assert lm(torch.zeros(2, 6, dtype=torch.long, device="meta")).logits.shape == (2, 6, 48)
    assert all(block.feed.flops() > 0 for block in lm.blocks)


def test_weights_go_round_through_a_state_dict(lm, make, feed_forward, draw):
    other = make(feed_forward=feed_forward, seed=9)
    other.load_state_dict(lm.state_dict(), strict=True)
    assert torch.equal(other(draw(2, 9)).logits, lm(draw(2, 9)).logits)


@pytest.mark.costly
def test_it_compiles_whole(make, feed_forward, agrees_compiled):
    agrees_compiled(make(feed_forward=feed_forward, depth=1))

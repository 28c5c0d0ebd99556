"""Every feed-forward processes each token on its own and ignores padding."""

import pytest
import torch
import torch.nn.functional as F

from tests.contracts.checks import (
    assert_causal,
    assert_checkpointing_changes_no_gradient,
    assert_flops_are_those_of_torchs_counter,
    assert_packed_documents_are_isolated,
    close,
    decode,
)
from tinsmith.nn.contract import Ctx

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


def context(x, segments=None):
    return Ctx(torch.arange(x.shape[1]).expand(x.shape[:2]), segments)


def test_tokens_do_not_depend_on_each_other(lm, x):
    """Alone, in another order and in another batch, a token has the same output."""
    feed = lm.blocks[0].feed
    whole = feed(x, context(x)).y
    assert whole.shape == x.shape
    for t in range(TOKENS):
        part = x[:, t : t + 1]
        close(feed(part, context(part)).y, whole[:, t : t + 1])
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))
    mixed = x[:, order]
    close(feed(mixed, context(mixed)).y, whole[:, order])
    close(feed(x.flip(0), context(x)).y.flip(0), whole)


def test_padding_changes_no_output_loss_or_stat(lm, x):
    feed = lm.blocks[0].feed.train()
    segments = torch.full((3, TOKENS), 0)
    alone = feed(x, context(x, segments))
    wider = torch.cat((torch.full_like(x, 50.0), x), 1)
    padding = torch.cat((torch.full_like(segments, -1), segments), 1)
    found = feed(wider, context(wider, padding))
    assert found.y.isfinite().all()
    close(found.y[:, TOKENS:], alone.y)
    close(found.losses, alone.losses)
    close(found.stats, alone.stats)


def test_it_depends_on_its_input(lm, x):
    feed = lm.blocks[0].feed
    moved = (feed(x, context(x)).y - feed(2 * x, context(x)).y).abs().amax(-1)
    assert (moved > 1e-3).all()


def test_logits_do_not_depend_on_later_tokens(lm, draw):
    assert_causal(lm, draw(2, 33), (0, 4, 16, 31))


def test_decoding_equals_the_full_forward(lm, draw):
    ids = draw(3, 20)
    expected = lm(ids).logits
    for lengths in ([1] * 20, [7, 1, 12]):
        close(decode(lm, ids, lengths), expected)


def test_packed_documents_are_isolated(lm, draw):
    assert_packed_documents_are_isolated(lm, draw(1, 17), [(-1, 2), (4, 7), (0, 5), (-1, 3)])


def test_every_parameter_gets_a_gradient(make, feed_forward, draw):
    lm = make(feed_forward=feed_forward, perturbed=False).train()
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
def test_checkpointing_changes_no_gradient(make, feed_forward, draw, dropout):
    rates = dict.fromkeys(("embedding", "attention", "residual"), dropout)
    lm = make(feed_forward=feed_forward, dropout=rates)
    assert_checkpointing_changes_no_gradient(lm, draw(2, 9), None)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_is_close_to_full(make, selective_kinds, feed_forward, draw, dtype, bound):
    """The error of hidden states (root mean square 1) stays below `bound`, with cast weights and
    under autocast. If rounding may change a selection, this holds for the better three quarters
    of the tokens.
    """

    def error(hidden):
        each = (hidden.float() - expected).square().mean(-1).flatten()
        count = 3 * len(each) // 4 if feed_forward["kind"] in selective_kinds else len(each)
        return each.sort().values[:count].mean().sqrt()

    ids = draw(2, 33)
    full = make(feed_forward=feed_forward, dtype=torch.float32, perturbed=False)
    expected = full(ids).hidden
    with torch.autocast("cpu", dtype):
        mixed = full(ids).hidden
    cast = make(feed_forward=feed_forward, dtype=dtype, perturbed=False)(ids).hidden
    assert error(mixed) < bound
    assert error(cast) < bound


def test_it_builds_on_the_meta_device_and_counts_flops(make, feed_forward):
    with torch.device("meta"):
        lm = make(feed_forward=feed_forward, perturbed=False)
    assert all(parameter.is_meta for parameter in lm.parameters())
    assert lm(torch.zeros(2, 6, dtype=torch.long, device="meta")).logits.shape == (2, 6, 48)
    assert all(block.feed.flops() > 0 for block in lm.blocks)


def test_N8_flops_count_every_matrix_product(lm, feed_forward):
    assert_flops_are_those_of_torchs_counter(lm, "feed", feed_forward["kind"])


def test_a_state_dict_restores_the_weights(lm, make, feed_forward, draw):
    other = make(feed_forward=feed_forward, seed=9)
    ids = draw(2, 9)
    assert not torch.isclose(other(ids).logits, lm(ids).logits).all()
    other.load_state_dict(lm.state_dict(), strict=True)
    assert torch.equal(other(ids).logits, lm(ids).logits)


@pytest.mark.costly
def test_it_compiles_without_a_graph_break(make, feed_forward, assert_compiles):
    assert_compiles(make(feed_forward=feed_forward, depth=1))

"""What every mixer must hold, with every residual: one model of each pair, in float64."""

import pytest
import torch

from tests.oracles.close import close_to

close = close_to(1e-10)

SIZES = [1, 3, 4, 5, 6, 33, 97]
"""One token, a block (4) and a window (5) and their neighbours, odd sizes above a power of two."""
LONG = pytest.param(256, marks=pytest.mark.slow)
LENGTHS = [1, 5, 9, 12]
"""Rows of different length."""


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def same(found, expected, exact):
    if exact:
        assert torch.equal(found, expected)
    close(found, expected)


def padded(ids, lengths, width, side):
    """Segments (B, width) and ids, with row b's first `lengths[b]` ids at one side."""
    segments = torch.full((len(lengths), width), -1)
    spread = torch.full((len(lengths), width), 3)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        segments[row, place] = 0
        spread[row, place] = ids[row, :length]
    return spread, segments


@pytest.mark.parametrize("size", [*SIZES, LONG])
def test_causality_is_exact_to_the_bit(lm, exact, draw, size):
    """Or to 1e-10, for kinds that group tokens by choice."""
    ids = draw(2, size)
    before = lm(ids).logits
    for last in sorted({0, 1, 3, 4, 5, size // 2, size - 2}):
        if not 0 <= last < size - 1:
            continue
        changed = ids.clone()
        changed[:, last + 1 :] = (ids[:, last + 1 :] + 7) % 48
        after = lm(changed).logits
        same(after[:, : last + 1], before[:, : last + 1], exact)
        assert not torch.isclose(after[:, last + 1], before[:, last + 1]).all(-1).any()


def test_a_prefix_says_what_the_whole_says(lm, draw):
    ids = draw(2, 97)
    whole = lm(ids).logits
    for size in SIZES:
        close(lm(ids[:, :size]).logits, whole[:, :size])


def test_the_past_is_received(lm, draw):
    ids = draw(2, 6)
    changed = ids.clone()
    changed[:, 2] = (ids[:, 2] + 7) % 48
    moved = (lm(changed).logits - lm(ids).logits).abs().amax((0, 2))
    assert (moved[2:] > 1e-3).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(lm, draw, side):
    ids = draw(4, 12)
    spread, segments = padded(ids, LENGTHS, 15, side)
    found = lm(spread, segments=segments)
    assert found.logits.isfinite().all()
    for row, length in enumerate(LENGTHS):
        alone = lm(ids[row : row + 1, :length]).logits[0]
        close(found.logits[row][segments[row] >= 0], alone)


def test_padding_is_not_counted_in_losses_and_stats(lm, draw):
    ids = draw(4, 12)
    lm.train()
    output = [
        lm(spread, segments=segments)
        for side, width in (("left", 12), ("right", 12), ("right", 19))
        for spread, segments in [padded(ids, LENGTHS, width, side)]
    ]
    for other in output[1:]:
        close(other.losses, output[0].losses)
        close(other.stats, output[0].stats)


def test_what_padding_holds_is_not_looked_at(lm, draw):
    ids = draw(4, 12)
    for side in ("left", "right"):
        spread, segments = padded(ids, LENGTHS, 15, side)
        other = torch.where(segments < 0, draw(4, 15, seed=5), spread)
        real = segments >= 0
        before, after = (lm(x, segments=segments).logits[real] for x in (spread, other))
        assert torch.equal(before, after)


def test_rows_of_nothing_but_padding_are_finite(lm, draw):
    segments = torch.zeros(3, 7, dtype=torch.long)
    segments[1] = -1
    ids = draw(3, 7)
    found = lm(ids, segments=segments).logits
    assert found.isfinite().all()
    close(found[[0, 2]], lm(ids[[0, 2]]).logits)


def test_packed_documents_are_isolated(lm, draw):
    """Any ids, in any order, the same one twice, documents of one token, padding at both ends."""
    runs = [(-1, 2), (7, 4), (3, 1), (7, 6), (0, 9), (1, 1), (2, 5), (-1, 3)]
    segments = torch.tensor([[name for name, length in runs for _ in range(length)]])
    ids = draw(1, segments.shape[1])
    found = lm(ids, segments=segments).logits[0]
    begin = 0
    for name, length in runs:
        end = begin + length
        if name >= 0:
            close(found[begin:end], lm(ids[:, begin:end]).logits[0])
        begin = end
    assert found.isfinite().all()


def test_another_document_leaves_no_trace(lm, draw, exact):
    segments = torch.tensor([[7] * 4 + [3] * 8 + [7] * 6])
    ids = draw(1, 18)
    changed = torch.where(segments == 3, (ids + 7) % 48, ids)
    before, after = lm(ids, segments=segments).logits, lm(changed, segments=segments).logits
    outside = segments != 3
    close(after[outside], before[outside])
    assert not exact or torch.equal(after[:, :4], before[:, :4])


def test_batch_invariance(lm, draw):
    ids = draw(5, 13)
    together = lm(ids).logits
    for row in range(5):
        close(together[row : row + 1], lm(ids[row : row + 1]).logits)
    close(lm(ids.flip(0)).logits.flip(0), together)


def test_probabilities_of_one_token_are_that_token(lm, draw):
    ids = draw(2, 9)
    certain = torch.nn.functional.one_hot(ids, 48).double()
    close(lm(certain).logits, lm(ids).logits)


def test_soft_inputs_pass_gradients(lm, choosers, mixer, draw):
    """To all tokens nearby; where tokens are chosen, at least to the query's own."""
    near = 1 if mixer["kind"] in choosers else 3
    with torch.enable_grad():
        soft = torch.nn.functional.one_hot(draw(2, 9), 48).double().requires_grad_()
        lm(soft).logits[:, -1].sum().backward()
    assert (soft.grad.abs().amax(-1)[:, -near:] > 0).all()


def test_logits_on_demand(lm, draw):
    ids = draw(2, 9)
    whole = lm(ids)
    assert lm(ids, logits=False).logits is None
    close(lm(ids, logits="last").logits, whole.logits[:, -1:])
    close(lm.head(whole.hidden[:, 2:4]), whole.logits[:, 2:4])


def test_naive_attention_says_the_same(make, mixer, residual, draw):
    """With padding and two documents, forward and backward, and when decoding."""
    models = [make(mixer=mixer, residual=residual, attention=kind) for kind in ("naive", "sdpa")]
    ids, segments = draw(2, 12), torch.tensor([[-1] * 3 + [0] * 9, [0] * 5 + [1] * 7])
    real = segments >= 0
    with torch.enable_grad():
        for model in models:
            model(ids, segments=segments).logits[real].square().sum().backward()
    for left, right in zip(*(model.parameters() for model in models), strict=True):
        close(left.grad, right.grad, 1e-8)
    caches = [model.new_caches(2, 20) for model in models]
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        found = [
            model(ids[:, begin:end], segments=segments[:, begin:end], caches=cache).logits
            for model, cache in zip(models, caches, strict=True)
        ]
        close(found[0][real[:, begin:end]], found[1][real[:, begin:end]])


def test_every_parameter_gets_a_gradient(make, mixer, residual, draw, still):
    lm = make(mixer=mixer, residual=residual, stirred=False).train()
    with torch.enable_grad():
        out = lm(draw(4, 33))
        targets = draw(4, 33, seed=2)
        loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
        (loss + sum(out.losses.values())).backward()
    for name, parameter in lm.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        size = parameter.grad.abs().max()
        assert size == 0 if still((mixer, residual), name) else size > 1e-9, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_gradients_are_equal_to_the_bit(make, mixer, residual, draw, dropout):
    shares = dict.fromkeys(("embedding", "attention", "residual"), dropout)
    segments = torch.tensor([[0] * 9, [0] * 4 + [1] * 5])
    gradients = []
    for checkpointing in (False, True):
        lm = make(mixer=mixer, residual=residual, dropout=shares).train()
        lm.activation_checkpointing = checkpointing
        torch.manual_seed(3)
        with torch.enable_grad():
            out = lm(draw(2, 9), segments=segments)
            (out.logits.square().sum() + sum(out.losses.values())).backward()
        gradients.append([parameter.grad for parameter in lm.parameters()])
    assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))


def test_dropout_acts_in_training_only(make, mixer, residual, draw):
    ids = draw(2, 9)
    plain = make(mixer=mixer, residual=residual)
    for name in ("embedding", "attention", "residual"):
        lm = make(mixer=mixer, residual=residual, dropout={name: 0.3})
        assert torch.equal(lm(ids).logits, plain(ids).logits), name
        assert not torch.isclose(lm.train()(ids).logits, plain(ids).logits).all(), name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_is_close_to_full(make, choosers, mixer, residual, draw, dtype, bound):
    """The error of the hidden states (root mean square 1) stays below `bound`, weights cast or
    autocast. Where rounding may turn a choice, of the better half of the tokens.
    """

    def error(hidden):
        each = (hidden[real].float() - expected).square().mean(-1)
        chosen = each if mixer["kind"] not in choosers else each.sort().values[: len(each) // 2]
        return chosen.mean().sqrt()

    ids, segments = draw(2, 33), torch.tensor([[-1] * 9 + [0] * 24, [0] * 20 + [1] * 13])
    real = segments >= 0
    full = make(mixer=mixer, residual=residual, dtype=torch.float32, stirred=False)
    expected = full(ids, segments=segments).hidden[real]
    with torch.autocast("cpu", dtype):
        mixed = full(ids, segments=segments)
    assert error(mixed.hidden) < bound
    half = make(mixer=mixer, residual=residual, dtype=dtype, stirred=False)
    cast = half(ids, segments=segments)
    assert error(cast.hidden) < bound
    assert cast.logits.dtype == mixed.logits.dtype == torch.float32
    assert cast.logits.isfinite().all()
    assert mixed.logits.isfinite().all()


@pytest.mark.parametrize("kind", ["sdpa", "naive"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_C4_left_padded_half_precision_has_no_nan(make, mixer, residual, draw, dtype, kind):
    """A mask of -1e9 becomes -inf in fp16, and a row of it NaN; forward, backward, decoding."""
    lm = make(mixer=mixer, residual=residual, dtype=dtype, attention=kind, stirred=False).train()
    spread, segments = padded(draw(4, 12), [0, 1, 5, 12], 12, "left")
    with torch.enable_grad():
        out = lm(spread, segments=segments)
        (out.logits[segments >= 0].square().mean() + sum(out.losses.values())).backward()
    assert out.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in lm.parameters())
    lm.eval()
    caches = lm.new_caches(4, 16)
    assert lm(spread, segments=segments, caches=caches).logits.isfinite().all()
    assert lm(draw(4, 1), caches=caches).logits.isfinite().all()


def test_it_builds_without_memory(make, mixer, residual):
    with torch.device("meta"):
        lm = make(mixer=mixer, residual=residual, stirred=False)
    assert all(parameter.is_meta for parameter in lm.parameters())
    assert lm(torch.zeros(2, 6, dtype=torch.long, device="meta")).logits.shape == (2, 6, 48)


def test_floating_point_operations_grow_with_context(lm):
    for block in lm.blocks:
        counts = [block.mixer.flops(context) for context in (1, 4, 64, 1024)]
        assert 0 < counts[0] <= counts[1] <= counts[2] <= counts[3]
        assert all(isinstance(count, int) for count in counts)


def test_weights_go_round_through_a_state_dict(lm, make, mixer, residual, draw):
    other = make(mixer=mixer, residual=residual, seed=9)
    ids = draw(2, 9)
    assert not torch.isclose(other(ids).logits, lm(ids).logits).all()
    other.load_state_dict(lm.state_dict(), strict=True)
    assert torch.equal(other(ids).logits, lm(ids).logits)


@pytest.mark.costly
def test_it_compiles_whole(make, mixer, agrees_compiled):
    """With the plain residual; test_residuals compiles each of the others with one mixer."""
    agrees_compiled(make(mixer=mixer, depth=2))


def test_it_is_stateless(lm, draw):
    """The same question twice is answered to the same bits, whatever was asked in between."""
    ids = draw(2, 12)
    before = lm(ids).logits
    lm(draw(3, 33), caches=lm.new_caches(3, 40))
    assert torch.equal(lm(ids).logits, before)

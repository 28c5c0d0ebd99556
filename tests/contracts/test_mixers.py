"""Every mixer, with every residual, is causal, isolates documents and ignores padding."""

from collections import Counter

import pytest
import torch

from tests.contracts.checks import (
    assert_checkpointing_changes_no_gradient,
    assert_flops_are_those_of_torchs_counter,
    assert_packed_documents_are_isolated,
    change_after,
    close,
    pad_rows,
)
from tinsmith.nn import contract
from tinsmith.nn.attention import span

SIZES = [1, 3, 4, 5, 6, 33, 97]
"""One token, sizes around a block (4) and a window (5), and odd sizes above a power of two."""
LONG = pytest.param(256, marks=pytest.mark.slow)
LENGTHS = [1, 5, 9, 12]
"""Rows of different length."""


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def pad(ids, width, side):
    """Pad rows of `LENGTHS` ids to `width`."""
    return pad_rows([ids[row, :length] for row, length in enumerate(LENGTHS)], width, side)


@pytest.mark.parametrize("size", [*SIZES, LONG])
def test_logits_do_not_depend_on_later_tokens(lm, is_bitwise_causal, draw, size):
    """Bit for bit, or to 1e-10 for kinds that group tokens by what they select."""
    ids = draw(2, size)
    before = lm(ids).logits
    for last in sorted({0, 1, 3, 4, 5, size // 2, size - 2}):
        if not 0 <= last < size - 1:
            continue
        after = lm(change_after(ids, last)).logits
        close(after[:, : last + 1], before[:, : last + 1])
        if is_bitwise_causal:
            assert torch.equal(after[:, : last + 1], before[:, : last + 1])
        assert not torch.isclose(after[:, last + 1], before[:, last + 1]).all(-1).any()


def test_a_prefix_has_the_logits_of_the_full_row(lm, draw):
    ids = draw(2, 97)
    whole = lm(ids).logits
    for size in SIZES:
        close(lm(ids[:, :size]).logits, whole[:, :size])


def test_logits_depend_on_earlier_tokens(lm, draw):
    ids = draw(2, 6)
    changed = ids.clone()
    changed[:, 2] = (ids[:, 2] + 7) % 48
    moved = (lm(changed).logits - lm(ids).logits).abs().amax((0, 2))
    assert (moved[2:] > 1e-3).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(lm, draw, side):
    ids = draw(4, 12)
    padded, segments = pad(ids, 15, side)
    logits = lm(padded, segments=segments).logits
    assert logits.isfinite().all()
    for row, length in enumerate(LENGTHS):
        alone = lm(ids[row : row + 1, :length]).logits[0]
        close(logits[row][segments[row] >= 0], alone)


def test_padding_is_not_counted_in_losses_and_stats(lm, draw):
    ids = draw(4, 12)
    lm.train()
    outs = [
        lm(padded, segments=segments)
        for side, width in (("left", 12), ("right", 12), ("right", 19))
        for padded, segments in [pad(ids, width, side)]
    ]
    for other in outs[1:]:
        close(other.losses, outs[0].losses)
        close(other.stats, outs[0].stats)


def test_ids_under_padding_are_not_used(lm, draw):
    ids = draw(4, 12)
    for side in ("left", "right"):
        padded, segments = pad(ids, 15, side)
        other = torch.where(segments < 0, draw(4, 15, seed=5), padded)
        real = segments >= 0
        before, after = (lm(x, segments=segments).logits[real] for x in (padded, other))
        assert torch.equal(before, after)


def test_rows_of_padding_alone_are_finite(lm, draw):
    segments = torch.zeros(3, 7, dtype=torch.long)
    segments[1] = -1
    ids = draw(3, 7)
    found = lm(ids, segments=segments).logits
    assert found.isfinite().all()
    close(found[[0, 2]], lm(ids[[0, 2]]).logits)


def test_packed_documents_are_isolated(lm, draw):
    """Any ids in any order, one id twice, documents of one token, padding at both ends."""
    runs = [(-1, 2), (7, 4), (3, 1), (7, 6), (0, 9), (1, 1), (2, 5), (-1, 3)]
    assert_packed_documents_are_isolated(lm, draw(1, 31), runs)


def test_a_document_does_not_change_others_in_its_row(lm, is_bitwise_causal, draw):
    segments = torch.tensor([[7] * 4 + [3] * 8 + [7] * 6])
    ids = draw(1, 18)
    changed = torch.where(segments == 3, (ids + 7) % 48, ids)
    before, after = lm(ids, segments=segments).logits, lm(changed, segments=segments).logits
    outside = segments != 3
    close(after[outside], before[outside])
    assert not is_bitwise_causal or torch.equal(after[:, :4], before[:, :4])


def test_rows_do_not_depend_on_each_other(lm, draw):
    ids = draw(5, 13)
    together = lm(ids).logits
    for row in range(5):
        close(together[row : row + 1], lm(ids[row : row + 1]).logits)
    close(lm(ids.flip(0)).logits.flip(0), together)


def test_one_hot_inputs_equal_ids(lm, draw):
    ids = draw(2, 9)
    certain = torch.nn.functional.one_hot(ids, 48).double()
    close(lm(certain).logits, lm(ids).logits)


def test_soft_inputs_pass_gradients(lm, selective_kinds, mixer, draw):
    """To all of the last three tokens; if tokens are selected, at least to the query's own."""
    near = 1 if mixer["kind"] in selective_kinds else 3
    with torch.enable_grad():
        soft = torch.nn.functional.one_hot(draw(2, 9), 48).double().requires_grad_()
        lm(soft).logits[:, -1].sum().backward()
    assert (soft.grad.abs().amax(-1)[:, -near:] > 0).all()


def test_logits_are_computed_on_request(lm, draw):
    ids = draw(2, 9)
    whole = lm(ids)
    assert lm(ids, logits=False).logits is None
    close(lm(ids, logits="last").logits, whole.logits[:, -1:])
    close(lm.head(whole.hidden[:, 2:4]), whole.logits[:, 2:4])


def test_naive_attention_equals_sdpa(make, mixer, residual, draw):
    """Forward and backward with padding and two documents, and decoding."""
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


def test_every_parameter_gets_a_gradient(make, mixer, residual, draw, has_zero_grad_at_init):
    lm = make(mixer=mixer, residual=residual, perturbed=False).train()
    with torch.enable_grad():
        out = lm(draw(4, 33))
        targets = draw(4, 33, seed=2)
        loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
        (loss + sum(out.losses.values())).backward()
    for name, parameter in lm.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        size = parameter.grad.abs().max()
        zero = has_zero_grad_at_init((mixer, residual), name)
        assert size == 0 if zero else size > 1e-9, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_gradient(make, mixer, residual, draw, dropout):
    rates = dict.fromkeys(("embedding", "attention", "residual"), dropout)
    segments = torch.tensor([[0] * 9, [0] * 4 + [1] * 5])
    lm = make(mixer=mixer, residual=residual, dropout=rates)
    assert_checkpointing_changes_no_gradient(lm, draw(2, 9), segments)


def test_dropout_acts_in_training_only(make, mixer, residual, draw):
    ids = draw(2, 9)
    plain = make(mixer=mixer, residual=residual)
    for name in ("embedding", "attention", "residual"):
        lm = make(mixer=mixer, residual=residual, dropout={name: 0.3})
        assert torch.equal(lm(ids).logits, plain(ids).logits), name
        assert not torch.isclose(lm.train()(ids).logits, plain(ids).logits).all(), name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_is_close_to_full(
    make, selective_kinds, mixer, residual, draw, dtype, bound
):
    """The error of hidden states (root mean square 1) stays below `bound`, with cast weights and
    under autocast. If rounding may change a selection, this holds for the better half of the
    tokens.
    """

    def error(hidden):
        each = (hidden[real].float() - expected).square().mean(-1)
        count = len(each) // 2 if mixer["kind"] in selective_kinds else len(each)
        return each.sort().values[:count].mean().sqrt()

    ids, segments = draw(2, 33), torch.tensor([[-1] * 9 + [0] * 24, [0] * 20 + [1] * 13])
    real = segments >= 0
    full = make(mixer=mixer, residual=residual, dtype=torch.float32, perturbed=False)
    expected = full(ids, segments=segments).hidden[real]
    with torch.autocast("cpu", dtype):
        mixed = full(ids, segments=segments)
    assert error(mixed.hidden) < bound
    half = make(mixer=mixer, residual=residual, dtype=dtype, perturbed=False)
    cast = half(ids, segments=segments)
    assert error(cast.hidden) < bound
    assert cast.logits.dtype == mixed.logits.dtype == torch.float32
    assert cast.logits.isfinite().all()
    assert mixed.logits.isfinite().all()


@pytest.mark.parametrize("kind", ["sdpa", "naive"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_C4_left_padded_half_precision_has_no_nan(make, mixer, residual, draw, dtype, kind):
    """A mask of -1e9 becomes -inf in fp16, and a row of it NaN; forward, backward, decoding."""
    lm = make(mixer=mixer, residual=residual, dtype=dtype, attention=kind, perturbed=False).train()
    ids = draw(4, 12)
    padded, segments = pad_rows([ids[0, :0], ids[1, :1], ids[2, :5], ids[3]], 12, "left")
    with torch.enable_grad():
        out = lm(padded, segments=segments)
        (out.logits[segments >= 0].square().mean() + sum(out.losses.values())).backward()
    assert out.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in lm.parameters())
    lm.eval()
    caches = lm.new_caches(4, 16)
    assert lm(padded, segments=segments, caches=caches).logits.isfinite().all()
    assert lm(draw(4, 1), caches=caches).logits.isfinite().all()


def test_it_builds_on_the_meta_device(make, mixer, residual):
    with torch.device("meta"):
        lm = make(mixer=mixer, residual=residual, perturbed=False)
    assert all(parameter.is_meta for parameter in lm.parameters())
    assert lm(torch.zeros(2, 6, dtype=torch.long, device="meta")).logits.shape == (2, 6, 48)


def test_flops_grow_with_the_context_length(lm):
    for block in lm.blocks:
        counts = [block.mixer.flops(context) for context in (1, 4, 64, 1024)]
        assert 0 < counts[0] <= counts[1] <= counts[2] <= counts[3]
        assert all(isinstance(count, int) for count in counts)


def test_N8_flops_count_every_matrix_product(lm, mixer):
    assert_flops_are_those_of_torchs_counter(lm, "mixer", mixer["kind"])


def test_a_state_dict_restores_the_weights(lm, make, mixer, residual, draw):
    other = make(mixer=mixer, residual=residual, seed=9)
    ids = draw(2, 9)
    assert not torch.isclose(other(ids).logits, lm(ids).logits).all()
    other.load_state_dict(lm.state_dict(), strict=True)
    assert torch.equal(other(ids).logits, lm(ids).logits)


def test_attention_spans_are_computed_once_per_forward_pass(lm, draw, monkeypatch):
    """All layers share the spans of `Ctx`, and documents are found once for all windows. If a mixer
    fails, it calls `ctx.span(window)` and `Mixer.window` is not set to this window.
    """
    calls = Counter()

    def count(owner, name):
        function = getattr(owner, name)

        def counted(*args):
            calls[name] += 1
            return function(*args)

        monkeypatch.setattr(owner, name, counted)

    count(span, "document_starts")
    count(contract, "attention_span")
    segments = torch.tensor([[-1] * 2 + [7] * 8 + [0] * 2, [0] * 12])
    lm(draw(2, 12), segments=segments)
    assert calls == {"document_starts": 1}
    lm(draw(2, 12))
    lm(draw(2, 12), segments=segments, caches=lm.new_caches(2, 12))
    assert calls == {"document_starts": 1}


def test_shared_spans_change_nothing(lm, draw):
    """A mixer that is called with positions and segments only computes the same bits."""
    segments = torch.tensor([[-1] * 2 + [7] * 8 + [0] * 2, [0] * 12])
    found = []
    for block in lm.blocks:
        alone = block.mixer.forward

        def forward(x, ctx, cache=None, alone=alone):
            shared = alone(x, ctx, cache).y
            found.append(torch.equal(shared, alone(x, ctx._replace(spans={}), cache).y))
            return contract.Out(shared)

        block.mixer.forward = forward
    for given in (segments, None):
        lm(draw(2, 12), segments=given)
    assert found == [True] * 2 * len(lm.blocks)


@pytest.mark.costly
def test_it_compiles_without_a_graph_break(make, mixer, assert_compiles):
    """With the plain residual. test_residuals compiles the other ones with one mixer."""
    assert_compiles(make(mixer=mixer, depth=2))


def test_it_is_stateless(lm, draw):
    """The same ids give the same bits again, with other calls in between."""
    ids = draw(2, 12)
    before = lm(ids).logits
    lm(draw(3, 33), caches=lm.new_caches(3, 40))
    assert torch.equal(lm(ids).logits, before)

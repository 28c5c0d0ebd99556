"""Layers of different mixers in one model, with every residual: what holds for each mixer holds for
their mixture.
"""

import pytest
import torch

from tests.oracles.close import close_to

close = close_to(1e-10)

LATENT = {"heads": 4, "kv_rank": 8, "q_rank": 12, "nope_dim": 6, "rope_dim": 4, "v_dim": 10}
HYBRID = LATENT | {"kind": "hybrid", "compress_block": 4, "window": 5, "index_topk": 5}
HYBRID |= {"index_heads": 2, "index_dim": 6}
GQA = {"kind": "gqa", "heads": 4, "kv_heads": 2, "value_residual": True}
NSA = {
    **{"kind": "nsa", "heads": 4, "kv_heads": 2, "value_residual": True, "window": 5},
    **{"compress_block": 2, "compress_stride": 1, "select_block": 2, "select_count": 4},
}
PATTERNS = {
    "the issue's": [
        HYBRID | {"mode": "swa"},
        HYBRID | {"mode": "nsa"},
        {"kind": "gqa", "heads": 4},
    ],
    "values offered by gqa": [
        {"kind": "mla"} | LATENT,
        GQA,
        HYBRID | {"mode": "dsa"},
        NSA,
        GQA | {"window": 3, "sinks": True},
    ],
    "values offered by nsa": [
        NSA,
        LATENT | {"kind": "dsa", "index_topk": 5, "index_dim": 4},
        GQA,
        NSA,
    ],
}
SPLITS = [[23], [1] * 23, [7, 7, 7, 2], [5, 1, 1, 9, 1, 6], [22, 1]]
RUNS = [(-1, 2), (7, 3), (3, 1), (7, 5), (0, 9), (-1, 3)]
"""Documents and padding of a packed row: (id, length)."""
SEGMENTS = torch.tensor([[name for name, length in RUNS for _ in range(length)]])


@pytest.fixture(params=PATTERNS)
def pattern(request):
    feed = {"kind": "swiglu", "hidden_dim": 48}
    return [{"mixer": mixer, "feed_forward": feed} for mixer in PATTERNS[request.param]]


@pytest.fixture
def lm(make, pattern, residual):
    return make(pattern=pattern, depth=len(pattern), residual=residual)


@torch.no_grad()
def test_prefill_equals_chunks_equals_one_by_one(lm, draw):
    ids = draw(2, 23)
    expected = lm(ids).logits
    for splits in SPLITS:
        caches, begin, found = lm.new_caches(2, 23), 0, []
        for length in splits:
            found.append(lm(ids[:, begin : begin + length], caches=caches).logits)
            begin += length
        close(torch.cat(found, 1), expected)


@torch.no_grad()
def test_rows_of_different_length_decode_as_if_alone(lm, draw):
    ids, lengths = draw(3, 16), (3, 6, 10)
    segments = torch.full((3, 10), -1)
    start = torch.full((3, 10), 3)
    for row, length in enumerate(lengths):
        segments[row, 10 - length :] = 0
        start[row, 10 - length :] = ids[row, :length]
    caches = lm.new_caches(3, 20)
    lm(start, segments=segments, caches=caches)
    for step in range(6):
        fresh = torch.stack([ids[row, length + step] for row, length in enumerate(lengths)])
        found = lm(fresh[:, None], caches=caches).logits[:, 0]
        for row, length in enumerate(lengths):
            close(found[row], lm(ids[row : row + 1, : length + step + 1]).logits[0, -1])


@torch.no_grad()
def test_packed_documents_are_isolated(lm, draw):
    ids = draw(1, SEGMENTS.shape[1])
    found, begin = lm(ids, segments=SEGMENTS).logits[0], 0
    for name, length in RUNS:
        end = begin + length
        if name >= 0:
            close(found[begin:end], lm(ids[:, begin:end]).logits[0])
        begin = end
    assert found.isfinite().all()


@torch.no_grad()
def test_no_token_hears_a_later_one(lm, draw):
    ids = draw(2, 23)
    before = lm(ids).logits
    for last in (0, 3, 4, 5, 11, 21):
        changed = ids.clone()
        changed[:, last + 1 :] = (ids[:, last + 1 :] + 7) % 48
        close(lm(changed).logits[:, : last + 1], before[:, : last + 1])


def test_checkpointed_gradients_are_equal_to_the_bit(make, pattern, residual, draw):
    gradients = []
    for checkpointing in (False, True):
        lm = make(pattern=pattern, depth=len(pattern), residual=residual).train()
        lm.activation_checkpointing = checkpointing
        out = lm(draw(1, SEGMENTS.shape[1]), segments=SEGMENTS)
        (out.logits.square().sum() + sum(out.losses.values())).backward()
        gradients.append([parameter.grad for parameter in lm.parameters()])
    assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    "pattern",
    [
        name if name == "the issue's" else pytest.param(name, marks=pytest.mark.slow)
        for name in PATTERNS
    ],
    indirect=True,
)
def test_it_compiles_whole(make, pattern, agrees_compiled):
    """With the residual of the paper; each of the others is compiled in test_residuals."""
    residual = {"kind": "mhyper", "streams": 2, "sinkhorn_iterations": 3}
    agrees_compiled(make(pattern=pattern, depth=len(pattern), residual=residual))

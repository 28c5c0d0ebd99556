"""Models whose layers have different mixers, with every residual."""

import pytest
import torch

from tests.contracts.checks import (
    assert_causal,
    assert_checkpointing_changes_no_gradient,
    assert_packed_documents_are_isolated,
    close,
    decode,
    pad_rows,
)

LATENT = {"heads": 4, "kv_rank": 8, "q_rank": 12, "nope_dim": 6, "rope_dim": 4, "v_dim": 10}
HYBRID = LATENT | {"kind": "hybrid", "compress_block": 4, "window": 5, "index_topk": 5}
HYBRID |= {"index_heads": 2, "index_dim": 6}
GQA = {"kind": "gqa", "heads": 4, "kv_heads": 2, "value_residual": True}
NSA = {
    **{"kind": "nsa", "heads": 4, "kv_heads": 2, "value_residual": True, "window": 5},
    **{"compress_block": 2, "compress_stride": 1, "select_block": 2, "select_count": 4},
}
PATTERNS = {
    "hybrid modes": [
        HYBRID | {"mode": "swa"},
        HYBRID | {"mode": "nsa"},
        {"kind": "gqa", "heads": 4},
    ],
    "value residual from gqa": [
        {"kind": "mla"} | LATENT,
        GQA,
        HYBRID | {"mode": "dsa"},
        NSA,
        GQA | {"window": 3, "sinks": True},
    ],
    "value residual from nsa": [
        NSA,
        LATENT | {"kind": "dsa", "index_topk": 5, "index_dim": 4},
        GQA,
        NSA,
    ],
}
SPLITS = [[23], [1] * 23, [7, 7, 7, 2], [5, 1, 1, 9, 1, 6], [22, 1]]
RUNS = [(-1, 2), (7, 3), (3, 1), (7, 5), (0, 9), (-1, 3)]
"""Documents and padding of a packed row: (id, length)."""


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
    for lengths in SPLITS:
        close(decode(lm, ids, lengths), expected)


@torch.no_grad()
def test_rows_of_different_length_decode_as_if_alone(lm, draw):
    ids, lengths = draw(3, 16), (3, 6, 10)
    prompts, segments = pad_rows([ids[row, :n] for row, n in enumerate(lengths)], 10, "left")
    caches = lm.new_caches(3, 20)
    lm(prompts, segments=segments, caches=caches)
    for step in range(6):
        fresh = torch.stack([ids[row, length + step] for row, length in enumerate(lengths)])
        found = lm(fresh[:, None], caches=caches).logits[:, 0]
        for row, length in enumerate(lengths):
            close(found[row], lm(ids[row : row + 1, : length + step + 1]).logits[0, -1])


@torch.no_grad()
def test_packed_documents_are_isolated(lm, draw):
    assert_packed_documents_are_isolated(lm, draw(1, 23), RUNS)


@torch.no_grad()
def test_logits_do_not_depend_on_later_tokens(lm, draw):
    assert_causal(lm, draw(2, 23), (0, 3, 4, 5, 11, 21))


def test_checkpointing_changes_no_gradient(lm, draw):
    segments = torch.tensor([[document for document, length in RUNS for _ in range(length)]])
    assert_checkpointing_changes_no_gradient(lm, draw(1, 23), segments)


@pytest.mark.parametrize(
    "pattern",
    [
        name if name == "hybrid modes" else pytest.param(name, marks=pytest.mark.slow)
        for name in PATTERNS
    ],
    indirect=True,
)
def test_it_compiles_without_a_graph_break(make, pattern, assert_compiles):
    """With one residual. test_residuals compiles the other ones."""
    residual = {"kind": "mhyper", "streams": 2, "sinkhorn_iterations": 3}
    assert_compiles(make(pattern=pattern, depth=len(pattern), residual=residual))

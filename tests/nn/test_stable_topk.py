"""Stable top-k selection: by score, then by index, independent of the last bits."""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinsmith.nn.layers.stable_topk import stable_topk
from tinsmith.nn.model import LM, ModelConfig


@given(st.lists(st.sampled_from([0.0, 0.5, -1.0, 3.25, float("-inf")]), min_size=1, max_size=30))
def test_selection_is_by_score_then_by_index(scores):
    expected = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    for count in (1, 3, len(scores)):
        found = stable_topk(torch.tensor(scores), count).tolist()
        assert found == expected[:count]


@given(st.integers(0, 1000))
def test_last_bits_do_not_affect_the_selection(seed):
    source = torch.Generator().manual_seed(seed)
    scores = torch.randint(-8, 8, (40,), generator=source) / 4
    noise = 1e-7 * torch.randn(40, generator=source)
    assert torch.equal(stable_topk(scores + noise, 12), stable_topk(scores, 12))


def test_a_longer_row_gives_the_same_selection():
    scores = torch.randint(0, 3, (5, 20), generator=torch.Generator().manual_seed(0)).float()
    longer = torch.cat((scores, torch.full((5, 9), -torch.inf)), -1)
    assert torch.equal(stable_topk(longer, 7), stable_topk(scores, 7))


def test_scores_beyond_the_grid_are_ties_and_nothing_overflows():
    scores = torch.tensor([1e30, -1e30, 5e30, 0.0, float("inf"), float("-inf")])
    assert stable_topk(scores, 6).tolist() == [0, 2, 4, 3, 1, 5]


def test_a_larger_count_than_candidates_selects_all():
    assert stable_topk(torch.tensor([[1.0, 2.0]]), 5).tolist() == [[1, 0]]


@pytest.mark.parametrize("kind", ["topk", "deepseek"])
def test_checkpointing_saves_a_selection_that_recomputation_would_change(
    kind, section, monkeypatch
):
    """On the second call the worst experts have the best scores, which must have no effect."""
    module = importlib.import_module(f"tinsmith.nn.feedforwards.{kind}")
    feed = {"kind": f"{kind}_moe", "experts": 6, "top_k": 2, "hidden_dim": 16}
    layer = {"mixer": {"kind": "gqa", "heads": 4}, "feed_forward": feed}
    ids = torch.randint(0, 48, (2, 12), generator=torch.Generator().manual_seed(1))
    found, requested = [], []

    def turning(scores, count):
        requested.append(count)
        return stable_topk(scores * (1 if len(requested) <= expected else -1), count)

    for checkpointing in (False, True):
        torch.manual_seed(0)
        lm = LM(ModelConfig.from_dict(section(depth=2, pattern=[layer]))).train()
        lm.activation_checkpointing = checkpointing
        if checkpointing:
            expected = len(requested)
            requested.clear()
        else:
            expected = 10**9
        monkeypatch.setattr(module, "stable_topk", turning)
        out = lm(ids)
        out.logits.square().sum().backward()
        found.append([p.grad for n, p in lm.named_parameters() if "experts" in n])
    assert len(requested) > expected
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))

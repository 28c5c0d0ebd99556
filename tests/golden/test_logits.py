"""Models of a fixed seed give the committed logits, which `regenerate.py` writes."""

import json

import pytest
import torch

from tests.golden.regenerate import FILE, MODELS, logits

GOLDEN = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", MODELS)
def test_logits_at_step_0_are_the_committed_ones(name):
    found = torch.tensor(logits()[name])
    torch.testing.assert_close(found, torch.tensor(GOLDEN[name]), rtol=1e-5, atol=1e-5)


def test_golden_logits_are_not_near_zero():
    """Logits near zero would let any model pass."""
    assert set(GOLDEN) == {"note", *MODELS}
    assert all(torch.tensor(GOLDEN[name]).std() > 0.01 for name in MODELS)

"""Weights in oneDNN's order: the same answers, the same parameters, nothing stale."""

import gc
import weakref

import pytest
import torch
from torch import nn

from tinsmith import LM, ModelConfig
from tinsmith.infer import packed as packing
from tinsmith.infer.packed import Packed, packed

SMALL = {
    "vocab_size": 96,
    "dim": 32,
    "depth": 2,
    "max_context": 64,
    "pattern": [
        {
            "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2, "bias": "qkv"},
            "feed_forward": {"kind": "swiglu", "hidden": 48},
        }
    ],
}
IDS = torch.arange(14).view(2, 7)


def model(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return LM(ModelConfig.from_dict(SMALL | changes)).to(dtype).eval()


def can_pack(dtype):
    return pytest.mark.skipif(dtype not in packing._dtypes(), reason="not packed here")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("dtype", "atol"),
    [
        pytest.param(torch.float32, 1e-5, marks=can_pack(torch.float32)),
        pytest.param(torch.bfloat16, 5e-2, marks=can_pack(torch.bfloat16)),
    ],
)
@torch.inference_mode()
def test_a_packed_model_says_the_same(dtype, atol, tied):
    with torch.inference_mode(False):
        lm = model(dtype, tie_embeddings=tied)
    twin = packed(lm)
    assert sum(isinstance(module, Packed) for module in twin.modules()) == 2 * 7 + 1
    torch.testing.assert_close(twin(IDS).logits, lm(IDS).logits, rtol=0, atol=atol)


@can_pack(torch.float32)
def test_parameters_are_shared_and_the_model_is_as_it_was():
    lm = model()
    twin = packed(lm)
    assert list(map(id, twin.parameters())) == list(map(id, lm.parameters()))
    assert list(twin.state_dict()) == list(lm.state_dict())
    assert not any(isinstance(module, Packed) for module in lm.modules())


@can_pack(torch.float32)
@torch.no_grad()
def test_weights_that_change_are_packed_again():
    lm = model()
    twin = packed(lm)
    before = twin(IDS).logits
    for parameter in lm.parameters():
        parameter.mul_(1.5)
    after = twin(IDS).logits
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, lm(IDS).logits, rtol=0, atol=1e-5)


@can_pack(torch.float32)
def test_a_model_is_packed_once_and_forgotten_with_it():
    lm = model()
    twin = packed(lm)
    assert packed(lm) is twin
    lm.head.weight = nn.Parameter(torch.zeros_like(lm.head.weight))
    assert packed(lm) is not twin
    gone = weakref.ref(lm)
    del lm
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_cannot_be_packed_is_left(dtype):
    lm = model(dtype)
    assert packed(lm) is lm


def test_a_compiled_model_is_left():
    lm = model()
    lm.compile(backend="eager")
    assert packed(lm) is lm

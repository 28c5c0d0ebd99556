"""Weights in oneDNN's order: the same answers, the same parameters, nothing stale."""

import pytest
import torch

from tinsmith import LM, ModelConfig
from tinsmith.infer import packed as packing
from tinsmith.infer.engine import Engine
from tinsmith.infer.packed import Packed, packed
from tinsmith.infer.sample import Sampling

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
def test_an_engine_follows_the_mode_and_the_weights_of_its_model():
    lm = model().train()
    engine, prompt = Engine(lm), list(range(9))

    def answer(engine):
        engine.add(prompt, Sampling(temperature=0), 12)
        return [event.token for event in engine.run()]

    with pytest.raises(ValueError, match="eval mode"):
        answer(engine)
    lm.eval()
    before = answer(Engine(lm))
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(4))
    fresh = answer(Engine(lm))
    assert fresh != before
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.data = parameter.data * 1.0
    assert answer(Engine(lm)) == fresh


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_an_engine_answers_under_autocast(precision):
    engine = Engine(model())
    engine.add([1, 2, 3], Sampling(temperature=0), 4)
    with torch.autocast("cpu", precision):
        assert len(list(engine.run())) == 4


@can_pack(torch.float32)
def test_gradients_pass_through_a_packed_model():
    lm = model()
    twin = packed(lm)
    with torch.no_grad():
        twin(IDS)
    twin(IDS).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in lm.parameters())


def test_weights_of_inference_mode_are_left():
    with torch.inference_mode():
        lm = model()
    assert packed(lm) is lm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_cannot_be_packed_is_left(dtype):
    lm = model(dtype)
    assert packed(lm) is lm


def test_a_compiled_model_is_left():
    lm = model()
    lm.compile(backend="eager")
    assert packed(lm) is lm

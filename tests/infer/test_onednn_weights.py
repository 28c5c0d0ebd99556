"""Weights in oneDNN's order: the same answers, the same parameters, nothing stale."""

import pytest
import torch

from tinsmith import LM, ModelConfig
from tinsmith.infer import onednn_weights as packing
from tinsmith.infer.engine import Engine
from tinsmith.infer.onednn_weights import PrepackedLinear, prepack_weights
from tinsmith.infer.sample import SamplingParams

SMALL = {
    "vocab_size": 96,
    "dim": 32,
    "depth": 2,
    "max_seq_len": 64,
    "pattern": [
        {
            "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2, "bias": "qkv"},
            "feed_forward": {"kind": "swiglu", "hidden_dim": 48},
        }
    ],
}
IDS = torch.arange(14).view(2, 7)


def model(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return LM(ModelConfig.from_dict(SMALL | changes)).to(dtype).eval()


def answer(engine):
    engine.add(range(9), SamplingParams(temperature=0), 12)
    return [event.token for event in engine.run()]


def greedily(lm):
    ids = list(range(9))
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(lm(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[9:]


def can_pack(dtype):
    return pytest.mark.skipif(dtype not in packing._supported_dtypes(), reason="not packed here")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("dtype", "atol"),
    [
        pytest.param(torch.float32, 1e-5, marks=can_pack(torch.float32)),
        pytest.param(torch.bfloat16, 5e-2, marks=can_pack(torch.bfloat16)),
    ],
)
@torch.inference_mode()
def test_prepacked_logits_equal_those_of_the_model(dtype, atol, tied):
    with torch.inference_mode(False):
        lm = model(dtype, tie_embeddings=tied)
    twin = prepack_weights(lm)
    assert sum(isinstance(module, PrepackedLinear) for module in twin.modules()) == 2 * 7 + 1
    torch.testing.assert_close(twin(IDS).logits, lm(IDS).logits, rtol=0, atol=atol)


@can_pack(torch.float32)
def test_parameters_are_shared_and_the_model_is_unchanged():
    lm = model()
    twin = prepack_weights(lm)
    assert list(map(id, twin.parameters())) == list(map(id, lm.parameters()))
    assert list(twin.state_dict()) == list(lm.state_dict())
    assert not any(isinstance(module, PrepackedLinear) for module in lm.modules())


@pytest.mark.parametrize("change", ["in place", "fused", "data", "assign"])
def test_changed_weights_are_used_in_the_next_generation(change):
    lm = model()
    engine = Engine(lm)
    answer(engine)
    generator = torch.Generator().manual_seed(4)
    new = {n: torch.randn(p.shape, generator=generator) for n, p in lm.named_parameters()}
    if change == "in place":
        lm.load_state_dict(new, strict=False)
    elif change == "assign":
        lm.load_state_dict(new | {"head.weight": new["embed.weight"]}, assign=True)
    elif change == "data":
        for name, parameter in lm.named_parameters():
            parameter.data = new[name]
    else:
        for name, parameter in lm.named_parameters():
            parameter.grad = parameter.detach() - new[name]
        torch.optim.SGD(lm.parameters(), lr=1.0, fused=True).step()
    assert answer(engine) == answer(Engine(lm))
    assert answer(engine) == greedily(lm)


@can_pack(torch.float32)
def test_an_engine_requires_eval_mode():
    lm = model().train()
    engine = Engine(lm)
    with pytest.raises(ValueError, match="eval mode"):
        answer(engine)
    lm.eval()
    assert answer(engine)[:1] == answer(Engine(lm))[:1]


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_an_engine_generates_under_autocast(precision):
    engine = Engine(model())
    engine.add([1, 2, 3], SamplingParams(temperature=0), 4)
    with torch.autocast("cpu", precision):
        assert len(list(engine.run())) == 4


@can_pack(torch.float32)
def test_gradients_flow_through_a_prepacked_model():
    lm = model()
    twin = prepack_weights(lm)
    with torch.no_grad():
        twin(IDS)
    twin(IDS).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in lm.parameters())


def test_weights_created_in_inference_mode_are_not_prepacked():
    with torch.inference_mode():
        lm = model()
    assert prepack_weights(lm) is lm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_unsupported_dtypes_are_not_prepacked(dtype):
    lm = model(dtype)
    assert prepack_weights(lm) is lm


def test_a_compiled_model_is_not_prepacked():
    lm = model()
    lm.compile(backend="eager")
    assert prepack_weights(lm) is lm

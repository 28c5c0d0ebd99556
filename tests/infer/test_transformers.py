"""Greedy ids beside transformers' `generate`, weights copied by hand."""

import pytest
import torch

from tinsmith.infer.engine import Engine
from tinsmith.infer.sample import SamplingParams


@pytest.fixture
def pair(small):
    """The same weights as an LM and as a `LlamaForCausalLM`, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    lm = small(dtype=torch.float32, rope={"theta": 10000.0}, norm_eps=1e-5)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    theirs = LlamaForCausalLM(config).eval()
    weights = {
        "model.embed_tokens.weight": lm.embed.weight,
        "model.norm.weight": lm.norm.weight,
        "lm_head.weight": lm.head.weight,
    }
    for number, block in enumerate(lm.blocks):
        mixer, feed = block.mixer, block.feed
        named = {
            "self_attn.q_proj": mixer.q_proj,
            "self_attn.k_proj": mixer.k_proj,
            "self_attn.v_proj": mixer.v_proj,
            "self_attn.o_proj": mixer.o_proj,
            "mlp.gate_proj": feed.gate_proj,
            "mlp.up_proj": feed.up_proj,
            "mlp.down_proj": feed.down_proj,
            "input_layernorm": block.mix_norm,
            "post_attention_layernorm": block.feed_norm,
        }
        weights |= {f"model.layers.{number}.{k}.weight": m.weight for k, m in named.items()}
    theirs.load_state_dict(weights, strict=True)
    return lm, theirs


def generated(model, prompts, count, **options):
    """Ids of transformers' `generate`, prompts padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count, **options)
    return out[:, width:].tolist()


@pytest.mark.parametrize(
    ("lengths", "penalty"), [([5], 1.0), ([9, 9, 9], 1.0), ([1, 30, 7], 1.0), ([9, 9], 1.2)]
)
def test_greedy_ids_equal_those_of_transformers(pair, draw, finished, lengths, penalty):
    lm, theirs = pair
    prompts = [draw(length, seed) for seed, length in enumerate(lengths)]
    engine = Engine(lm)
    for prompt in prompts:
        engine.add(prompt, SamplingParams(temperature=0, repetition_penalty=penalty), 40)
    found = [[event.token for event in events] for events in finished(engine).values()]
    assert found == generated(theirs, prompts, 40, repetition_penalty=penalty)
    assert len({*found[0]}) > 3

import pytest
import torch

from tinsmith.hub.families.names import NAME_MAPS


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "tinsmith"])
def test_tensor_names_map_one_to_one_in_both_directions(family, model):
    lm = model({"qk_norm": True, "bias": "all"}, depth=12, tie_embeddings=False)
    names = NAME_MAPS[family]
    ours = list(lm.state_dict())
    theirs = [names.to_hf_name(name) for name in ours]
    assert len(set(theirs)) == len(ours)
    assert [names.from_hf_name(name) for name in theirs] == ours


@pytest.mark.parametrize(
    ("family", "kind"),
    [("qwen3_moe", "topk_moe"), ("mixtral", "topk_moe"), ("deepseek_v3", "deepseek_moe")],
)
def test_stacks_of_experts_split_and_stack_again(family, kind, model):
    mixer = {"kind": "mla", "heads": 4} if family == "deepseek_v3" else {"kind": "gqa", "heads": 4}
    feed = {"kind": kind, "experts": 11, "hidden_dim": 8}
    lm = model(depth=12, pattern=[{"mixer": mixer, "feed_forward": feed}])
    names, state = NAME_MAPS[family], lm.state_dict()
    parts = names.split_experts(state)
    assert len(parts) == len(state) + 12 * 3 * (11 - 1)
    theirs = [names.to_hf_name(name) for name in parts]
    assert len(set(theirs)) == len(theirs)
    assert [names.from_hf_name(name) for name in theirs] == list(parts)
    whole = names.stack_experts(dict(reversed(parts.items())))
    assert whole.keys() == state.keys()
    assert all(torch.equal(whole[name], value) for name, value in state.items())


def test_names_equal_those_of_hugging_face():
    names = NAME_MAPS["qwen3"]
    assert names.to_hf_name("embed.weight") == "model.embed_tokens.weight"
    assert names.to_hf_name("head.weight") == "lm_head.weight"
    assert (
        names.to_hf_name("blocks.11.mixer.q_norm.weight")
        == "model.layers.11.self_attn.q_norm.weight"
    )
    mixtral = NAME_MAPS["mixtral"].to_hf_name
    expert = "model.layers.2.block_sparse_moe.experts.10"
    assert mixtral("blocks.2.feed.experts.10.gate_proj.weight") == f"{expert}.w1.weight"
    assert mixtral("blocks.2.feed.experts.10.up_proj.weight") == f"{expert}.w3.weight"
    bias = "model.layers.4.mlp.gate.e_score_correction_bias"
    assert NAME_MAPS["deepseek_v3"].to_hf_name("blocks.4.feed.bias") == bias
    assert NAME_MAPS["deepseek_v3"].from_hf_name(bias) == "blocks.4.feed.bias"
    assert (
        names.from_hf_name("model.layers.3.mlp.down_proj.weight")
        == "blocks.3.feed.down_proj.weight"
    )


@pytest.mark.parametrize(
    "name",
    ["model.layers.{}.self_attn.q_proj.weight", "model.norm", "x.weight", "", "model.norm.scale"],
)
def test_an_unknown_name_raises_key_error(name):
    with pytest.raises(KeyError):
        NAME_MAPS["llama"].from_hf_name(name)
    with pytest.raises(KeyError):
        NAME_MAPS["tinsmith"].from_hf_name(name)
    with pytest.raises(KeyError):
        NAME_MAPS["deepseek_v3"].from_hf_name(name)

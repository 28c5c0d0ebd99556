import pytest

from tinsmith.hub.names import NAMES


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "tinsmith"])
def test_every_tensor_of_a_model_has_a_name_of_its_own_and_the_way_back_is_exact(family, model):
    lm = model({"qk_norm": True, "bias": "all"}, depth=12, tie_embeddings=False)
    names = NAMES[family]
    ours = list(lm.state_dict())
    theirs = [names.theirs(name) for name in ours]
    assert len(set(theirs)) == len(ours)
    assert [names.ours(name) for name in theirs] == ours


def test_the_names_are_those_of_hugging_face():
    names = NAMES["qwen3"]
    assert names.theirs("embed.weight") == "model.embed_tokens.weight"
    assert names.theirs("head.weight") == "lm_head.weight"
    assert (
        names.theirs("blocks.11.mixer.q_norm.weight") == "model.layers.11.self_attn.q_norm.weight"
    )
    assert names.ours("model.layers.3.mlp.down_proj.weight") == "blocks.3.feed.down_proj.weight"


@pytest.mark.parametrize(
    "name",
    ["model.layers.{}.self_attn.q_proj.weight", "model.norm", "x.weight", "", "model.norm.scale"],
)
def test_a_name_without_counterpart_is_an_error(name):
    with pytest.raises(KeyError):
        NAMES["llama"].ours(name)
    with pytest.raises(KeyError):
        NAMES["tinsmith"].ours(name)

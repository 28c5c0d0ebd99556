import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tinsmith.core.errors import UserError
from tinsmith.hub.from_hf import config_from_hf
from tinsmith.hub.to_hf import config_to_hf
from tinsmith.nn.config import ModelConfig

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def layer(window=None, hidden=48, **mixer):
    return {
        "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2, "window": window} | mixer,
        "feed_forward": {"kind": "swiglu", "hidden_dim": hidden},
    }


def config(*layers, **changes):
    data = {"vocab_size": 96, "dim": 32, "depth": 4, "pattern": list(layers) or [layer()]}
    return ModelConfig.from_dict(data | changes)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 4, 6]),
    kv_heads=st.sampled_from([None, 1, 2]),
    head_dim=st.sampled_from([None, 6, 16]),
    qk_norm=st.booleans(),
    bias=st.sampled_from(["none", "qkv", "all"]),
    windows=st.lists(st.sampled_from([None, 5, 5, 9]), min_size=1, max_size=4),
    feed_bias=st.booleans(),
    tie=st.booleans(),
    depth=st.integers(1, 7),
    scaling=st.sampled_from([None, {"kind": "yarn", "factor": 4, "original_max_seq_len": 32}]),
)
def test_config_json_round_trips_to_the_same_layers(
    heads, kv_heads, head_dim, qk_norm, bias, windows, feed_bias, tie, depth, scaling
):
    assume(heads % (kv_heads or heads) == 0 and (head_dim or 48 % heads == 0))
    pattern = [
        {
            "mixer": {
                "kind": "gqa",
                "heads": heads,
                "kv_heads": kv_heads,
                "head_dim": head_dim,
                "qk_norm": qk_norm,
                "bias": bias,
                "window": window,
            },
            "feed_forward": {"kind": "swiglu", "hidden_dim": 40, "bias": feed_bias},
        }
        for window in windows
    ]
    data = {"vocab_size": 96, "dim": 48, "depth": depth, "pattern": pattern}
    data |= {"tie_embeddings": tie, "rope": {"theta": 5e5, "scaling": scaling}, "norm_eps": 2e-6}
    before = ModelConfig.from_dict(data)
    translation = config_to_hf(before)
    after = config_from_hf(json.loads(json.dumps(translation.data)))
    assert (translation.family == "tinsmith") == (translation.reason is not None)
    assert written_out(after) == written_out(before)


def mla(**sizes):
    return {
        "mixer": {"kind": "mla", "heads": 4} | sizes,
        "feed_forward": {"kind": "swiglu", "hidden_dim": 48},
    }


def written_out(config):
    """All settings that affect the computation, in a normal form."""
    layers = [
        (
            one.mixer.heads,
            one.mixer.num_kv_heads,
            one.mixer.resolve_head_dim(config.dim),
            one.mixer.qk_norm,
            one.mixer.bias,
            one.mixer.window,
            one.feed_forward,
        )
        for one in config.layers
    ]
    sizes = (config.vocab_size, config.dim, config.depth, config.max_seq_len)
    return layers, sizes, config.tie_embeddings, config.rope, config.norm_eps, config.norm


def routed(one, **keys):
    return one | {"feed_forward": {"kind": "topk_moe", "hidden_dim": 48} | keys}


def deep(one, **keys):
    return one | {"feed_forward": {"kind": "deepseek_moe", "hidden_dim": 48} | keys}


@pytest.mark.parametrize(
    ("layers", "changes", "family"),
    [
        ([layer()], {}, "llama"),
        ([mla()], {}, "deepseek_v3"),
        ([layer(bias="all")], {}, "llama"),
        ([layer(head_dim=16)], {}, "llama"),
        ([layer(window=5)], {}, "mistral"),
        ([layer(heads=6, kv_heads=3, head_dim=8)], {}, "mistral"),
        ([layer(bias="qkv")], {}, "qwen2"),
        ([layer(bias="qkv"), layer(bias="qkv", window=5)], {}, "qwen2"),
        ([layer(qk_norm=True)], {}, "qwen3"),
        ([routed(layer(qk_norm=True))], {}, "qwen3_moe"),
        ([routed(layer(qk_norm=True)), layer(qk_norm=True)], {}, "qwen3_moe"),
        ([routed(layer(), balance="squared"), routed(layer())], {}, "mixtral"),
        ([deep(mla())], {"first": [mla()]}, "deepseek_v3"),
        ([layer(qk_norm=True, bias="all", window=5), layer(qk_norm=True, bias="all")], {}, "qwen3"),
        ([layer(kv_heads=None), layer(kv_heads=4, head_dim=8)], {}, "llama"),
        ([layer()], {"dropout": {"embedding": 0.1, "residual": 0.2}}, "llama"),
        ([layer()], {"attention": "naive"}, "llama"),
        ([layer()], {"first": [layer()], "last": [layer()]}, "llama"),
    ],
)
def test_a_stock_family_is_used_if_all_layers_allow_it(layers, changes, family):
    translation = config_to_hf(config(*layers, **changes))
    assert (translation.family, translation.reason) == (family, None)


def relu2(one):
    return one | {"feed_forward": {"kind": "relu2", "hidden_dim": 48}}


def biased(one):
    return one | {"feed_forward": one["feed_forward"] | {"bias": True}}


@pytest.mark.parametrize(
    ("layers", "changes", "reason"),
    [
        ([layer(), relu2(layer())], {}, "layer 1 has feed_forward relu2"),
        ([layer(), mla()], {}, "layer 1 is of another shape than layer 0"),
        ([mla(), mla(v_dim=4)], {}, "layer 1 is of another shape than layer 0"),
        ([relu2(mla())], {}, "layer 0 has feed_forward relu2"),
        ([layer(sinks=True)], {}, "layer 0 has sinks"),
        ([deep(layer())], {}, "layer 0 has feed_forward deepseek_moe"),
        ([routed(mla())], {}, "layer 0 has feed_forward topk_moe"),
        ([routed(layer()), routed(layer(), experts=5)], {}, "layer 1 is of another shape"),
        (
            [routed(layer(qk_norm=True), n_shared_experts=1)],
            {},
            "shared experts beside grouped-query",
        ),
        ([routed(layer(), activation="relu2")], {}, "experts of relu2"),
        ([routed(layer()), layer()], {}, "dense layers beside experts, without q/k norms"),
        ([routed(layer(), top_k=1)], {}, "raw weights of experts, without q/k norms"),
        ([routed(layer(), norm_topk_prob=False)], {}, "raw weights of experts, without q/k norms"),
        ([routed(layer(bias="all"))], {}, "biases beside experts, without q/k norms"),
        (
            [routed(layer(qk_norm=True)), routed(layer(qk_norm=True, window=5))],
            {},
            "windows on some layers only, beside experts",
        ),
        (
            [routed(layer(qk_norm=True)), biased(layer(qk_norm=True))],
            {},
            "feed_forward.bias beside experts",
        ),
        ([routed(layer(qk_norm=True, bias="qkv"))], {}, "q/k norms beside q/k/v biases"),
        ([deep(mla()), mla()], {}, "layer 1 is dense after layers of experts"),
        (
            [deep(mla()), deep(mla(), routed_scaling_factor=2)],
            {},
            "layer 1 is of another shape than layer 0",
        ),
        ([deep(mla(), score="softmax")], {}, "a softmax score beside latent attention"),
        ([deep(mla(), n_shared_experts=0)], {}, "no shared experts beside latent attention"),
        ([deep(mla(), n_group=8)], {}, "groups of one expert"),
        ([layer(value_residual=True)], {}, "layer 0 has value_residual"),
        ([layer(), layer(rope=False)], {}, "layer 1 has rope: false"),
        ([layer(), layer(), layer(heads=2)], {}, "layer 2 is of another shape than layer 0"),
        ([layer(), layer(hidden=64)], {}, "layer 1 is of another shape than layer 0"),
        ([layer(window=5), layer(window=6)], {}, "windows of 2 widths"),
        ([layer(window=5), layer()], {}, "windows on some layers only, without q/k norms or q/k/v"),
        ([layer(window=5, bias="all")], {}, "windows beside biases"),
        ([layer(qk_norm=True, bias="qkv")], {}, "q/k norms beside q/k/v biases"),
        ([biased(layer(bias="qkv"))], {}, "feed_forward.bias beside"),
        ([biased(layer(window=4))], {}, "windows beside biases"),
        ([layer(heads=6, head_dim=8, bias="all")], {}, "dim=32 is no multiple of heads=6"),
        ([layer()], {"norm": "layer"}, "norm is layer"),
        ([layer()], {"positions": "learned"}, "positions is learned"),
    ],
)
def test_otherwise_the_model_type_is_tinsmith_with_a_reason(layers, changes, reason):
    before = config(*layers, **changes)
    translation = config_to_hf(before)
    assert translation.family == "tinsmith"
    assert reason in (translation.reason or "")
    assert config_from_hf(json.loads(json.dumps(translation.data))) == before


@pytest.mark.parametrize(
    ("kind", "given_keys", "windows"),
    [
        ("llama", {}, [None] * 4),
        ("llama", {"sliding_window": 9}, [None] * 4),
        ("mistral", {}, [4096] * 4),
        ("mistral", {"sliding_window": None}, [None] * 4),
        ("mistral", {"sliding_window": 7}, [7] * 4),
        ("qwen2", {"sliding_window": 7}, [None] * 4),
        ("mixtral", {}, [None] * 4),
        ("mixtral", {"sliding_window": 7}, [7] * 4),
        ("qwen3_moe", {"sliding_window": 7}, [None] * 4),
        ("qwen3_moe", {"sliding_window": 7, "use_sliding_window": True}, [7] * 4),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}, [None, None, None, 4096]),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None}, [None] * 4),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 7,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            [7, None, 7, None],
        ),
    ],
)
def test_attention_windows_equal_those_of_transformers(kind, given_keys, windows):
    read = config_from_hf(BASE | {"model_type": kind, "head_dim": 8} | given_keys)
    assert [one.mixer.window for one in read.layers] == windows


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral"])
def test_missing_keys_have_the_defaults_of_transformers(kind):
    from transformers import AutoConfig

    sizes = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
    sizes |= {"hidden_size": 256, "num_attention_heads": 32}
    theirs = AutoConfig.for_model(kind, **sizes)
    ours = config_from_hf(sizes | {"model_type": kind})
    mixer = ours.layers[0].mixer
    width = theirs.to_dict().get("head_dim") or 8
    assert (mixer.num_kv_heads, mixer.resolve_head_dim(256)) == (theirs.num_key_value_heads, width)
    assert ours.max_seq_len == theirs.max_position_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    feed = ours.layers[0].feed_forward
    if feed.kind == "topk_moe":
        assert (feed.experts, feed.top_k) == (theirs.num_local_experts, theirs.num_experts_per_tok)
        assert feed.balance_weight == theirs.router_aux_loss_coef
    assert mixer.window == (4096 if kind == "mistral" else None)


DENSE = {"first_k_dense_replace": 4}


@pytest.mark.parametrize(
    ("kind", "changes", "output"),
    [
        ("gpt2", {}, "model_type: 'gpt2' is not one of llama, mistral, qwen2, qwen3, q"),
        ("qwen4", {}, "Did you mean 'qwen"),
        (None, {}, "model_type: None is not one of"),
        (["llama"], {}, "model_type: ['llama'] is not one of"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported (only 'silu'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: {'bits': 4} is not"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved: True is not supported"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0 is not"),
        ("llama", {"rope_scaling": {"type": "longrope"}}, "rope_scaling: rope_type: 'longrope'"),
        ("llama", {"vocab_size": None}, "vocab_size: required key is missing"),
        ("llama", {"hidden_size": "32"}, "hidden_size: must be a whole number"),
        ("llama", {"hidden_size": True}, "hidden_size: must be a whole number"),
        ("llama", {"hidden_size": 32.5}, "hidden_size: must be a whole number"),
        ("llama", {"hidden_size": 10**30}, "hidden_size: must be a whole number from 1 to 1048576"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers: must be a whole number from 1"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers: must be a whole number from"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide num_att"),
        ("llama", {"num_attention_heads": 5, "num_key_value_heads": 5}, "heads=5"),
        ("llama", {"attention_bias": "yes"}, "attention_bias: must be true or false"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings: must be true or false"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps: must be a number above 0"),
        ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps: must be a number above 0"),
        ("llama", {"attention_dropout": 1.5}, "attention=1.5 must be at least 0 and below 1"),
        ("llama", {"layer_types": ["sliding_attention"] * 4}, "layer_types: a llama model cannot"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types: a mistral model cannot"),
        ("mistral", {"sliding_window": 0}, "sliding_window: must be a whole number from 1"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types: must be a list of 4 names"),
        ("qwen2", {"layer_types": ["linear_attention"] * 4}, "layer_types: 'linear_attention' is"),
        ("qwen2", {"layer_types": [[]] * 4}, "layer_types: [] is not one of"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "but no sliding_window is in use"),
        ("qwen2", {"max_window_layers": "x"}, "max_window_layers: must be a whole number"),
        ("deepseek_v2", {}, "first_k_dense_replace: 0 of 4 layers: V2's experts are not read"),
        ("deepseek_v3", {"first_k_dense_replace": "3"}, "first_k_dense_replace: must be a number"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method: 'greedy' is not supported"),
        ("deepseek_v3", {"n_group": 7}, "n_group=7 must divide experts=256"),
        ("deepseek_v3", {"num_experts_per_tok": 1}, "norm_topk_prob: one expert a token"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok: one expert a token, ren"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise: 0.1 is not supported"),
        ("mixtral", {"num_local_experts": 1}, "top_k=2 must be at most experts=1"),
        ("qwen3_moe", {"num_experts": 4}, "top_k=8 must be at most experts=4"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers: must be a list of layers (got 3)"),
        ("deepseek_v3", DENSE | {"rope_interleave": False}, "rope_interleave: False is not"),
        ("deepseek_v3", DENSE | {"attention_bias": True}, "attention_bias: True is not supported"),
        ("deepseek_v2", DENSE | {"qk_rope_head_dim": 7}, "rope_dim=7 must be even"),
        (
            "deepseek_v3",
            DENSE | {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_scaling: mscale: must be that of mscale_all_dim",
        ),
        ("tinsmith", {}, "tinsmith.schema: None, and this version reads 1"),
        ("tinsmith", {"tinsmith": {"schema": 2}}, "tinsmith.schema: 2, and this version reads 1"),
        ("tinsmith", {"tinsmith": {"schema": 1}}, "tinsmith.model: must be an object"),
        (
            "tinsmith",
            {"tinsmith": {"schema": 1, "model": {"vocab_size": 9, "dim": 8, "depth": 10**9}}},
            "tinsmith.model: depth: must be a whole number",
        ),
        (
            "tinsmith",
            {"tinsmith": {"schema": 1, "model": {"vocab_size": 9, "dim": 8, "depth": 1, "x": 1}}},
            "tinsmith.model: x: unknown key",
        ),
    ],
)
def test_unsupported_configs_give_one_line_with_the_key(kind, changes, output):
    with pytest.raises(UserError) as caught:
        config_from_hf(BASE | {"model_type": kind} | changes, "folder/config.json")
    assert output in str(caught.value)
    assert str(caught.value).startswith("folder/config.json: ")
    assert "\n" not in str(caught.value)


def test_neutral_and_unknown_keys_are_ignored():
    changes = {"hidden_act": "swish", "quantization_config": None, "unsloth_version": "1"}
    changes |= {"pretraining_tp": 1, "rope_interleaved": False, "partial_rotary_factor": 1.0}
    plain = config_from_hf(BASE | {"model_type": "llama"})
    assert config_from_hf(BASE | {"model_type": "llama"} | changes) == plain


def test_layers_are_read_as_the_shortest_pattern():
    types = ["sliding_attention", "full_attention", "full_attention"] * 2
    changes = {"use_sliding_window": True, "layer_types": types, "num_hidden_layers": 6}
    read = config_from_hf(BASE | {"model_type": "qwen2"} | changes)
    assert len(read.pattern) == 3
    assert len(config_from_hf(BASE | {"model_type": "qwen2"}).pattern) == 1

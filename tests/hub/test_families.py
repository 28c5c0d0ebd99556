"""Import and export of stock families against transformers: equal tensors, logits within 1e-5."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tinsmith import load
from tinsmith.hub.hf import export_folder
from tinsmith.nn.model import ModelConfig

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
THETA = {"rope_theta": 500.0}
ALTERNATING = {
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LATENT = {
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 0,
}
QWEN3_MOE = {
    "head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "norm_topk_prob": True,
}
DEEPSEEK_MOE = LATENT | {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "n_group": 4,
    "topk_group": 2,
}
SCALED = {"mscale": 0.707, "mscale_all_dim": 0.707}
CASES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama wide heads, one key head": ("llama", {"head_dim": 16, "num_key_value_heads": 1}),
    "llama all key heads": ("llama", {"num_key_value_heads": 4}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0} | THETA}),
    "llama llama3": ("llama", {"rope_parameters": LLAMA3 | THETA}),
    "llama yarn tied": ("llama", {"rope_parameters": YARN | THETA, "tie_word_embeddings": True}),
    "llama yarn, all said": (
        "llama",
        {
            "rope_parameters": YARN
            | THETA
            | {"attention_factor": 1.3, "beta_fast": 4.0, "beta_slow": 0.5}
        },
    ),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral tied, no window": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "mistral odd width": ("mistral", {"hidden_size": 36, "num_attention_heads": 8, "head_dim": 6}),
    "mistral yarn": ("mistral", {"sliding_window": 7, "rope_parameters": YARN | THETA}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 upper windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2 alternating windows": ("qwen2", ALTERNATING),
    "qwen2 wide heads, yarn": ("qwen2", {"head_dim": 16, "rope_parameters": YARN | THETA}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3 biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "qwen3 alternating windows": ("qwen3", {"head_dim": 8} | ALTERNATING),
    "qwen3 yarn": ("qwen3", {"head_dim": 16, "rope_parameters": YARN | THETA}),
    "qwen3_moe": ("qwen3_moe", QWEN3_MOE),
    "qwen3_moe raw weights, tied": (
        "qwen3_moe",
        QWEN3_MOE
        | {"norm_topk_prob": False, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    ),
    "qwen3_moe dense layers, windows, biases": (
        "qwen3_moe",
        QWEN3_MOE
        | {"mlp_only_layers": [1], "attention_bias": True}
        | {"use_sliding_window": True, "sliding_window": 5},
    ),
    "qwen3_moe every second": ("qwen3_moe", QWEN3_MOE | {"decoder_sparse_step": 2}),
    "qwen3_moe yarn": ("qwen3_moe", QWEN3_MOE | {"rope_parameters": YARN | THETA}),
    "mixtral": ("mixtral", {"num_local_experts": 5}),
    "mixtral windows, tied": (
        "mixtral",
        {
            **{"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 5},
            **{"head_dim": 16, "tie_word_embeddings": True},
        },
    ),
    "deepseek_v3 experts": ("deepseek_v3", DEEPSEEK_MOE),
    "deepseek_v3 experts everywhere, raw": (
        "deepseek_v3",
        DEEPSEEK_MOE
        | {"first_k_dense_replace": 0, "norm_topk_prob": False, "n_group": 1}
        | {"topk_group": 1, "routed_scaling_factor": 1.0, "n_shared_experts": 1},
    ),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "deepseek_v3 straight, tied": (
        "deepseek_v3",
        LATENT | {"q_lora_rank": None, "tie_word_embeddings": True},
    ),
    "deepseek_v3 yarn": (
        "deepseek_v3",
        LATENT | {"rope_parameters": YARN | THETA | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek_v2": ("deepseek_v2", LATENT),
    "deepseek_v2 yarn": (
        "deepseek_v2",
        LATENT | {"q_lora_rank": None, "rope_parameters": YARN | THETA | SCALED},
    ),
}


def theirs(kind, changes, randomised):
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    config = transformers.AutoConfig.for_model(kind, **(sizes | changes))
    return randomised(transformers.AutoModelForCausalLM.from_config(config)).eval()


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same_logits(ours, hugging_face, ids):
    """Plain rows that are longer than every window, and rows padded on the left."""
    with torch.no_grad():
        wanted = hugging_face(ids).logits
        assert wanted.abs().max() > 0.5
        torch.testing.assert_close(ours(ids).logits, wanted, atol=1e-5, rtol=0)
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        wanted = hugging_face(ids, attention_mask=mask, position_ids=positions).logits
        got = ours(ids, segments=mask - 1).logits
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got[mask > 0], wanted[mask > 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shard", ["1GB", "8KB"])
@pytest.mark.parametrize("case", CASES)
def test_a_transformers_folder_gives_equal_logits_and_exports_bit_for_bit(
    case, shard, tmp_path, randomised, ids
):
    kind, changes = CASES[case]
    hugging_face = theirs(kind, changes, randomised)
    hugging_face.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == (shard == "8KB")
    ours, tokenizer = load(tmp_path / "theirs")
    assert tokenizer is None
    assert not ours.training
    assert_same_logits(ours, hugging_face, ids)

    export_folder(ours, None, tmp_path / "ours", max_shard_bytes=8000 if shard == "8KB" else 10**9)
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    windowless = kind == "mistral" and hugging_face.config.sliding_window is None
    renamed = {"deepseek_v2": "deepseek_v3"} | ({"mistral": "llama"} if windowless else {})
    assert back.config.model_type == renamed.get(kind, kind)
    with torch.no_grad():
        found, wanted = back(ids).logits, hugging_face(ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-6 if kind in renamed else 0.0, rtol=0)


MLA = {
    "kind": "mla",
    "heads": 4,
    "kv_rank": 12,
    "q_rank": 20,
    "nope_dim": 6,
    "rope_dim": 8,
    "v_dim": 10,
}


def routed(mixer, feed_forward, **more):
    """A pattern instead of the usual one."""
    return {"pattern": [{"mixer": mixer, "feed_forward": feed_forward}]} | more


def dense(mixer):
    return {"mixer": mixer, "feed_forward": {"kind": "swiglu", "hidden_dim": 48}}


GQA = {"kind": "gqa", "heads": 4, "kv_heads": 2}
TOP_K = {"kind": "topk_moe", "experts": 4, "top_k": 2, "hidden_dim": 20}
DEEPSEEK = {"kind": "deepseek_moe", "experts": 8, "top_k": 3, "hidden_dim": 20}
OURS = {
    "qwen3_moe": ("qwen3_moe", None, routed(GQA | {"qk_norm": True}, TOP_K)),
    "qwen3_moe one expert, dense first": (
        "qwen3_moe",
        None,
        routed(
            GQA | {"qk_norm": True, "bias": "all"},
            TOP_K | {"top_k": 1, "balance": "sequence", "z_weight": 0.1},
            first=[dense(GQA | {"qk_norm": True, "bias": "all"})],
        ),
    ),
    "mixtral": ("mixtral", None, routed(GQA | {"window": 5}, TOP_K, tie_embeddings=False)),
    "deepseek_v3 experts": (
        "deepseek_v3",
        None,
        routed(
            MLA,
            DEEPSEEK
            | {
                "n_group": 4,
                "topk_group": 2,
                "routed_scaling_factor": 2.5,
                "noise": 0.1,
                "n_shared_experts": 2,
            },
            first=[dense(MLA)],
        ),
    ),
    "deepseek_v3 one expert": ("deepseek_v3", None, routed(MLA, DEEPSEEK | {"top_k": 1})),
    "llama": ("llama", {"kv_heads": 1}, {}),
    "llama tied biases": ("llama", {"bias": "all", "head_dim": 16}, {"tie_embeddings": True}),
    "mistral": ("mistral", {"window": 5}, {}),
    "mistral by width": ("mistral", {"heads": 6, "kv_heads": 3, "head_dim": 8}, {}),
    "qwen2": ("qwen2", {"bias": "qkv", "head_dim": 6}, {"tie_embeddings": False}),
    "qwen2 windows": ("qwen2", {"bias": "qkv", "window": 6}, {}),
    "qwen3": ("qwen3", {"qk_norm": True}, {"norm_eps": 1e-6, "rope": {"theta": 1e6}}),
    "qwen3 untied": ("qwen3", {"qk_norm": True, "window": 5}, {"tie_embeddings": False}),
    "yarn": (
        "llama",
        {},
        {"rope": {"scaling": {"kind": "yarn", "factor": 4, "original_max_seq_len": 16}}},
    ),
    "llama3": (
        "llama",
        {},
        {"rope": {"scaling": {"kind": "llama3", "factor": 4, "original_max_seq_len": 16}}},
    ),
    "deepseek_v3": ("deepseek_v3", MLA, {}),
    "deepseek_v3 tied": ("deepseek_v3", MLA | {"q_rank": None}, {"tie_embeddings": True}),
    "deepseek_v3 yarn": (
        "deepseek_v3",
        MLA,
        {"rope": {"scaling": {"kind": "yarn", "factor": 4, "original_max_seq_len": 16}}},
    ),
    "deepseek_v3 yarn, another factor": (
        "deepseek_v3",
        MLA,
        {
            "rope": {
                "scaling": {
                    "kind": "yarn",
                    "factor": 4,
                    "original_max_seq_len": 16,
                    "attention_factor": 1.25,
                }
            }
        },
    ),
    "linear": ("qwen3", {"qk_norm": True}, {"rope": {"scaling": {"kind": "linear", "factor": 3}}}),
}


@pytest.mark.parametrize("case", OURS)
def test_an_exported_folder_gives_equal_logits_in_transformers_and_imports_bit_for_bit(
    case, tmp_path, model, ids
):
    kind, mixer, changes = OURS[case]
    ours = model(mixer, **changes)
    assert export_folder(ours, None, tmp_path / "ours").family == kind
    hugging_face = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert hugging_face.config.model_type == kind
    assert_same_logits(ours, hugging_face, ids)
    hugging_face.save_pretrained(tmp_path / "theirs")
    back, _ = load(tmp_path / "theirs")
    before, after = ours.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (back.head.weight is back.embed.weight) == ours.config.tie_embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_keep_their_dtype_in_both_directions(dtype, tmp_path, model):
    ours = model().to(dtype)
    export_folder(ours, None, tmp_path / "ours")
    hugging_face = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert hugging_face.dtype == dtype
    hugging_face.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        back, _ = load(tmp_path / folder)
        assert {parameter.dtype for parameter in back.parameters()} == {dtype}
        wanted = ours.state_dict()
        assert all(torch.equal(wanted[name], value) for name, value in back.state_dict().items())


def test_rope_scaling_at_loading_equals_transformers(tmp_path, randomised, ids):
    plain = theirs("llama", {}, randomised)
    plain.save_pretrained(tmp_path)
    stretched = theirs("llama", {"rope_parameters": YARN | {"rope_theta": 1e4}}, randomised)
    requested = {"kind": "yarn", "factor": 4, "original_max_seq_len": 16}
    for scaling in (YARN, requested):
        ours, _ = load(tmp_path, rope_scaling=scaling)
        with torch.no_grad():
            difference = (ours(ids).logits - plain(ids).logits).abs().max()
        assert difference > 1e-3
        assert_same_logits(ours, stretched, ids)


@pytest.mark.parametrize(
    ("name", "count", "family"),
    [
        ("minimind2-26m", 25_829_888, "llama"),
        ("minimind2-104m", 104_030_976, "llama"),
        ("minimind3-64m", 63_912_192, "qwen3"),
        ("minimind3-198m-moe", 198_416_640, "qwen3_moe"),
    ],
)
def test_presets_are_stock_models_with_the_published_parameter_count(name, count, family):
    from tinsmith.hub.to_hf import config_to_hf

    translation = config_to_hf(ModelConfig.preset(name))
    assert translation.family == family
    config = transformers.AutoConfig.for_model(
        family, **{key: value for key, value in translation.data.items() if key != "model_type"}
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == count

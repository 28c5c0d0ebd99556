"""D5, D20: importing and exporting a folder of transformers leaves its settings as they are."""

import json

import pytest
import torch
import transformers
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tinsmith.hub.hf import export_folder
from tinsmith.hub.load import load
from tinsmith.text.tokenizer import Tokenizer as TinsmithTokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}
LATENT = {
    **{"kv_lora_rank": 12, "q_lora_rank": 20, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8},
    **{"v_head_dim": 10, "num_key_value_heads": 4, "first_k_dense_replace": 1},
    **{"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    **{"num_nextn_predict_layers": 0},
}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": MOE | {"num_experts": 4, "head_dim": 8},
    "mixtral": {"num_local_experts": 4},
    "deepseek_v3": MOE | LATENT,
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '\\n' + m['content'] | trim"
    " + '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}"
    "{% endif %}"
)
NASTY = [
    *("", " ", "  two  spaces ", "\n\n", "tab\tand\r\n", "don't 1234", "<s>", "</s> <|eot|>"),
    *(
        "e\u0301 \u00e9 \ufb01",
        "\u4e2d\u6587\u3000",
        "\U0001f469\u200d\U0001f4bb",
        "\x00\x7f\u2028",
    ),
]


def nasty_texts():
    """200 texts: pairs of pieces that tokenizers treat differently."""
    pairs = [first + second for first in [*NASTY, "the cat"] for second in [*NASTY, "ran", "x y"]]
    return pairs[:200]


def sentencepiece():
    """Return a tokenizer as Llama 2's: byte fallback, a space before the text, BOS, no template."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "th"]
    pieces += [*"abcdefghijklmnopqrstuvwxyz", "\u2581t"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("t", "h"), ("\u2581", "t")]
    raw = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    raw.add_special_tokens([AddedToken(name, special=True) for name in pieces[:3]])
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_level(template=TEMPLATE):
    """Return a tokenizer as Llama 3's: byte-level, several ends, a padding token, a template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({piece: index for index, piece in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    names = ("begin", "end", "start", "eot", "pad", "im_start", "im_end")
    raw.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in names])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|begin|>",
        eos_token="<|eot|>",
        pad_token="<|pad|>",
        chat_template=template,
    )


def write_source(folder, family, tokenizer):
    """Write a model of `family` with random weights, its tokenizer and sampling defaults."""
    eos = [tokenizer.eos_token_id]
    if "<|end|>" in tokenizer.get_vocab():
        eos.append(tokenizer.convert_tokens_to_ids("<|end|>"))
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos}
    ids |= {"pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(family, **SIZES | FAMILIES[family], **ids)
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 48}
    GenerationConfig(**ids, **sampling).save_pretrained(folder)
    return folder


def settings(path, kind):
    """Return the settings of a folder as transformers reads them, without keys that have no effect:
    a derived `head_dim`, dense sizes of a model with experts only, and constants of DeepSeek-V3.
    """
    data = kind.from_pretrained(path).to_dict()
    if kind is AutoConfig:
        data["head_dim"] = data.get("head_dim") or data["hidden_size"] // 4
        if data["model_type"] == "qwen3_moe":
            del data["intermediate_size"]
    inert = ("_name_or_path", "transformers_version", "scoring_func", "topk_method")
    return {key: value for key, value in data.items() if key not in inert}


@pytest.mark.parametrize("make", [sentencepiece, byte_level, lambda: byte_level(None)])
@pytest.mark.parametrize("family", FAMILIES)
def test_D5_import_and_export_leave_settings_special_tokens_and_ids_as_they_are(
    tmp_path, family, make
):
    source = write_source(tmp_path / "source", family, make())
    copy = tmp_path / "copy"
    export_folder(*load(source), copy)
    for kind in (AutoConfig, GenerationConfig):
        assert settings(copy, kind) == settings(source, kind)
    before, after = (AutoTokenizer.from_pretrained(path) for path in (source, copy))
    assert after.special_tokens_map == before.special_tokens_map
    assert after.chat_template == before.chat_template
    assert after.get_vocab() == before.get_vocab()
    for text in nasty_texts():
        assert after(text)["input_ids"] == before(text)["input_ids"]
    ids = torch.arange(24)[None] * 7 % len(before)
    logits = [AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (source, copy)]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("where", ["special_tokens_map.json", "config.json"])
def test_D20_roles_that_tokenizer_config_lacks_are_read_from_other_files(tmp_path, where):
    source = write_source(tmp_path / "source", "llama", sentencepiece())
    path = source / "tokenizer_config.json"
    config = json.loads(path.read_text())
    roles = {key: config.pop(key) for key in ("bos_token", "eos_token", "unk_token")}
    path.write_text(json.dumps(config))
    if where == "special_tokens_map.json":
        (source / where).write_text(json.dumps(roles))
    tokenizer = TinsmithTokenizer.load(source)
    assert (tokenizer.bos, tokenizer.eos) == ("<s>", "</s>")
    assert tokenizer.vocab_size == len(AutoTokenizer.from_pretrained(source))


def test_D5_a_checkpoint_keeps_the_sampling_defaults_and_every_end_id(tmp_path):
    source = write_source(tmp_path / "source", "llama", byte_level())
    tokenizer = TinsmithTokenizer.load(source)
    tokenizer.save(tmp_path / "checkpoint")
    restored = TinsmithTokenizer.load(tmp_path / "checkpoint")
    assert restored.eos_ids == tokenizer.eos_ids
    assert len(restored.eos_ids) == 2
    assert restored.folder_settings.generation["temperature"] == 0.6
    assert restored.fingerprint() == tokenizer.fingerprint()


def test_D5_a_model_for_chats_also_ends_at_the_end_of_turn(tmp_path):
    source = write_source(tmp_path / "source", "llama", byte_level(None))
    lm, tokenizer = load(source)
    assert tokenizer is not None
    chats = tokenizer.for_chats()
    assert chats.vocab_size == tokenizer.vocab_size
    export_folder(lm, chats, tmp_path / "out")
    ids = [tokenizer.special(name) for name in ("<|end|>", "<|eot|>", "<|im_end|>")]
    assert settings(tmp_path / "out", GenerationConfig)["eos_token_id"] == ids
    assert settings(tmp_path / "out", GenerationConfig)["temperature"] == 0.6

"""Small Hugging Face folders that transformers writes: models with random weights, tokenizers."""

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
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

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

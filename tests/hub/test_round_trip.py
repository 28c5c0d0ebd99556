"""D5, D20: importing and exporting a folder of transformers leaves its settings as they are."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.hf_folders import FAMILIES, byte_level, sentencepiece, write_source
from tinsmith.hub.hf import export_folder
from tinsmith.hub.load import load
from tinsmith.text.tokenizer import Tokenizer

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
    tokenizer = Tokenizer.load(source)
    assert (tokenizer.bos, tokenizer.eos) == ("<s>", "</s>")
    assert tokenizer.vocab_size == len(AutoTokenizer.from_pretrained(source))


def test_D5_a_checkpoint_keeps_the_sampling_defaults_and_every_end_id(tmp_path):
    source = write_source(tmp_path / "source", "llama", byte_level())
    tokenizer = Tokenizer.load(source)
    tokenizer.save(tmp_path / "checkpoint")
    restored = Tokenizer.load(tmp_path / "checkpoint")
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

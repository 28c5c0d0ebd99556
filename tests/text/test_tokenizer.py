"""Text to ids and back: lossless on anything, and never a special id from text."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from tinsmith.core.errors import UserError
from tinsmith.text.byte_encoding import split_text
from tinsmith.text.specials import CHAT_TOKENS
from tinsmith.text.tokenizer import MAX_PIECE_CHARS, SPECIALS, Tokenizer

FAMILIES = ["own", "gpt2", "llama", "metaspace", "qwen"]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_bytes_come_back_as_they_were(families, any_bytes, family):
    tokenizer = families[family]

    @settings(derandomize=True, deadline=None, max_examples=300)
    @given(any_bytes)
    def check(raw):
        assert tokenizer.bytes_of(tokenizer.encode(raw)) == raw
        assert tokenizer.encode_many([raw, raw]) == [tokenizer.encode(raw)] * 2

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_any_text_comes_back_as_it_was_and_holds_no_special_id(families, any_text, family):
    tokenizer = families[family]
    added = set(tokenizer.added_tokens.values())

    @settings(derandomize=True, deadline=None, max_examples=300)
    @given(any_text)
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert added.isdisjoint(ids)
        assert tokenizer.encode_many([text]) == [ids]
        inside = tokenizer.encode_inside(text)
        assert b"".join(tokenizer.token_bytes(number) for number in inside) == text.encode()
        assert added.isdisjoint(inside)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_special_token_is_spelled_out_in_text(families, family):
    tokenizer = families[family]
    for name, number in tokenizer.added_tokens.items():
        ids = tokenizer.encode(f"a{name}b {name}")
        assert number not in ids
        assert tokenizer.decode(ids) == f"a{name}b {name}"
        assert tokenizer.decode([number]) == name


def test_added_tokens_that_are_ordinary_words_are_spelled_out_too(tokenizer):
    """An added token may be a piece that merges reach, as encoding without added tokens does."""
    settings = json.loads(tokenizer.to_json())
    word = max(
        settings["model"]["vocab"],
        key=lambda piece: len(piece) * (piece.isascii() and piece.isalpha()),
    )
    flags = settings["added_tokens"][0] | {
        "id": settings["model"]["vocab"][word],
        "content": word,
    }
    settings["added_tokens"].append(flags)
    changed = Tokenizer(json.dumps(settings))
    assert tokenizer.encode(word) == [flags["id"]]
    ids = changed.encode(word)
    assert flags["id"] not in ids
    assert changed.decode(ids) == word


@settings(derandomize=True, deadline=None)
@given(ids=st.lists(st.integers(-3, 900), max_size=40))
def test_decode_is_bytes_of_with_broken_bytes_replaced(tokenizer, ids):
    assert tokenizer.decode(ids) == tokenizer.bytes_of(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_agrees_with_tokenizers(families, family):
    tokenizer = families[family]
    reference = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    texts = ["the fox", " the  fox", "naïve café 你好 😀\n\tx", "a", ""]
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.end_of_turn]
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("family", ["own", "gpt2", "llama", "metaspace"])
def test_plain_text_has_the_ids_that_tokenizers_gives_it(families, corpus, family):
    tokenizer = families[family]
    reference = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    for text in [*corpus, "the cat", "x"]:
        ids = reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids


def test_specials_are_the_first_ids_and_only_tags_survive_skipping(tokenizer):
    assert [tokenizer.special(name) for name in SPECIALS] == list(range(16))
    assert (tokenizer.end_of_text, tokenizer.end_of_turn) == (0, 2)
    flags = {t["content"]: t["special"] for t in json.loads(tokenizer.to_json())["added_tokens"]}
    assert flags == {name: name.startswith("<|") for name in SPECIALS}


def test_an_unknown_special_token_is_one_line_with_the_nearest_name(tokenizer):
    with pytest.raises(
        UserError, match=r"no special token '<\|im_ends\|>'\. Did you mean '<\|im_end"
    ):
        tokenizer.special("<|im_ends|>")


@pytest.mark.parametrize("family", FAMILIES)
def test_byte_lengths_count_the_bytes_of_text(families, corpus, family):
    tokenizer = families[family]
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths.dtype == np.int64
    assert not lengths[list(tokenizer.added_tokens.values())].any()
    text = "".join(corpus)
    ids = tokenizer.encode_inside(text)
    assert lengths[ids].sum() == len(text.encode())


def test_unknown_ids_are_silent(tokenizer):
    assert tokenizer.bytes_of([tokenizer.vocab_size + 5, -1]) == b""


def test_lone_surrogates_are_refused_in_one_line(tokenizer):
    for call in (
        tokenizer.encode,
        tokenizer.encode_inside,
        lambda text: tokenizer.encode_many([text]),
    ):
        with pytest.raises(UserError, match="character 2 of a text is a lone surrogate"):
            call("ab\ud800")


def test_a_vocabulary_of_symbols_writes_its_symbols_and_refuses_the_rest():
    words = {"<|endoftext|>": 0, "0": 1, "1": 2, "\n": 3, "[UNK]": 4}
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    symbols = Tokenizer(made.to_str())
    assert symbols.encode("01\n0") == [1, 2, 3, 1]
    assert symbols.decode([1, 2, 3, 1]) == "01\n0"
    for text in ("2", "0[UNK]", b"\xff", "<|endoftext|>"):
        with pytest.raises(UserError, match="cannot represent"):
            symbols.encode(text)


def test_a_vocabulary_that_lacks_bytes_says_so_instead_of_losing_them(corpus):
    made = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    small = Tokenizer(made.to_str())
    assert small.decode(small.encode("abba")) == "abba"
    for text in ("abc", b"a\xff"):
        with pytest.raises(UserError, match="cannot represent"):
            small.encode(text)


def test_nothing_is_added_to_a_vocabulary_when_it_is_loaded(families, gpt2_folder):
    vocabulary = json.loads((gpt2_folder / "vocab.json").read_text())
    gpt2 = families["gpt2"]
    assert gpt2.vocab_size == len(vocabulary)
    assert gpt2.special("<|endoftext|>") == vocabulary["<|endoftext|>"] == gpt2.end_of_text
    assert gpt2.end_of_turn == gpt2.end_of_text
    for name, foreign in families.items():
        settings = json.loads(foreign.to_json())
        assert len(settings["added_tokens"]) == len(foreign.added_tokens), name


def test_for_chats_adds_missing_chat_tokens_after_the_last_id(families, gpt2_folder):
    vocabulary = json.loads((gpt2_folder / "vocab.json").read_text())
    gpt2 = families["gpt2"].for_chats()
    new = [token_id for name, token_id in gpt2.added_tokens.items() if name != "<|endoftext|>"]
    assert sorted(new) == list(range(len(vocabulary), len(vocabulary) + 10))
    assert gpt2.vocab_size == len(vocabulary) + 10
    flags = {t["content"]: t["special"] for t in json.loads(gpt2.to_json())["added_tokens"]}
    assert flags == {name: name.startswith("<|") for name in CHAT_TOKENS}
    assert gpt2.end_of_turn == gpt2.special("<|im_end|>")
    assert gpt2.encode("a b <|im_end|>") == families["gpt2"].encode("a b <|im_end|>")


@pytest.mark.parametrize("family", ["own", "qwen"])
def test_for_chats_adds_nothing_to_a_vocabulary_with_turn_tokens(families, family):
    tokenizer = families[family]
    assert tokenizer.for_chats().to_json() == tokenizer.to_json()
    assert [tokenizer.special(name) for name in SPECIALS[:3]] == [0, 1, 2]


def test_for_chats_adds_nothing_to_a_tokenizer_with_a_template(families):
    own = Tokenizer(families["llama"].to_json(), eos="</s>", chat_template="{{ messages }}")
    assert own.for_chats().to_json() == own.to_json()
    assert own.end_of_turn == own.special("</s>")


def test_a_foreign_end_of_text_keeps_its_role(families):
    llama = families["llama"].for_chats()
    assert llama.end_of_text == llama.special("</s>")
    assert llama.end_of_turn == llama.special("<|im_end|>")
    assert llama.eos_ids == (llama.special("</s>"), llama.special("<|im_end|>"))


def test_D16_roles_template_and_post_processor_do_not_change_the_vocabulary(tokenizer):
    settings = json.loads(tokenizer.to_json())
    template = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    copy = json.dumps(settings | {"post_processor": template | {"use_regex": True}})
    other = Tokenizer(copy, eos="<|im_end|>", chat_template="{{ messages }}")
    assert other.fingerprint() != tokenizer.fingerprint()
    assert other.vocabulary_fingerprint() == tokenizer.vocabulary_fingerprint()
    settings["model"]["merges"].pop()
    changed = Tokenizer(json.dumps(settings))
    assert changed.vocabulary_fingerprint() != tokenizer.vocabulary_fingerprint()


@pytest.mark.parametrize(
    ("post_processor", "prefix"),
    [
        (None, []),
        (processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)]), [1]),
        (processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)]), []),
        (processors.RobertaProcessing(("</s>", 2), ("<s>", 1)), [1]),
        (processors.Sequence([processors.BertProcessing(("</s>", 2), ("<s>", 1))]), [1]),
    ],
)
def test_D6_the_prefix_is_what_the_post_processor_puts_before_a_text(
    llama_json, post_processor, prefix
):
    raw = tokenizers.Tokenizer.from_str(llama_json)
    if post_processor is not None:
        raw.post_processor = post_processor
    tokenizer = Tokenizer(raw.to_str(), bos="<s>", eos="</s>")
    assert tokenizer.prefix == prefix
    ids = prefix + tokenizer.encode("the cat")
    assert raw.encode("the cat").ids[: len(ids)] == ids


def test_a_fingerprint_changes_with_the_vocabulary_and_the_template_only(tokenizer):
    settings, template = json.loads(tokenizer.to_json()), tokenizer.chat_template
    copy = Tokenizer(json.dumps(settings), chat_template=template)
    assert copy.fingerprint() == tokenizer.fingerprint()
    settings["model"]["merges"].pop()
    changed = Tokenizer(json.dumps(settings), chat_template=template)
    assert changed.fingerprint() != tokenizer.fingerprint()
    other = Tokenizer(tokenizer.to_json(), chat_template="{{ messages }}")
    assert other.fingerprint() != tokenizer.fingerprint()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_in_another_process_is_the_same(families, family):
    copy = pickle.loads(pickle.dumps(families[family]))
    assert copy.fingerprint() == families[family].fingerprint()
    assert copy.encode("the fox") == families[family].encode("the fox")


@pytest.mark.parametrize("text", ["{", "[]", '{"model": 1}', "null", "{}"])
def test_what_is_no_tokenizer_json_is_one_line(text):
    with pytest.raises(UserError, match=r"not a tokenizer\.json") as caught:
        Tokenizer(text)
    assert "\n" not in str(caught.value)


def test_text_needs_no_torch():
    code = "import sys, tinsmith.text.chat, tinsmith.text.stream, tinsmith.text.bpe as b;"
    code += "b.train_bpe(['a'], 300); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("family", ["own", "gpt2", "llama", "metaspace"])
def test_a_long_text_has_the_ids_it_has_in_one_go(families, corpus, family):
    tokenizer = families[family]
    reference = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    text = "".join(corpus) * (250_000 // len("".join(corpus)) + 1)
    assert len(text) > 2 * MAX_PIECE_CHARS
    ids = reference.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == ids
    assert tokenizer.encode_many([text, "x"]) == [ids, tokenizer.encode("x")]


@settings(derandomize=True, deadline=None)
@given(text=st.text("ab\n ", max_size=60), longest=st.integers(1, 20))
def test_parts_of_a_long_text_are_short_and_make_it_whole(text, longest):
    parts = split_text(text, longest)
    assert "".join(parts) == text
    assert max(map(len, parts)) <= longest
    assert all(parts) or not text


def test_a_million_of_one_kind_take_no_time(tokenizer):
    """Longer runs make the splitters of `tokenizers` panic; they are cut first."""
    for text in (" " * 1_000_000, "a" * 1_000_000, " \n" * 500_000, b"\xff" * 100_000):
        raw = text.encode() if isinstance(text, str) else text
        assert tokenizer.bytes_of(tokenizer.encode(text)) == raw

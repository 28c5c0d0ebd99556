"""Streams of text: whole characters, at once, and in the end all of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.text.stream import TextStream

FAMILIES = ["own", "gpt2", "llama", "metaspace"]


def pieces(tokenizer, ids):
    stream = TextStream(tokenizer)
    return [*(stream.push(number) for number in ids), stream.finish()]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_increments_together_are_the_decoded_text(families, any_bytes, family):
    tokenizer = families[family]
    numbers = st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=30)

    @settings(derandomize=True, deadline=None, max_examples=300)
    @given(st.one_of(numbers, any_bytes.map(tokenizer.encode)))
    def check(ids):
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_never_split_inside_a_character_nor_held_back_longer_than_that(
    families, any_text, family
):
    tokenizer = families[family]

    @settings(derandomize=True, deadline=None, max_examples=300)
    @given(any_text)
    def check(text):
        ids = tokenizer.encode(text)
        stream = TextStream(tokenizer)
        seen = ""
        for place, number in enumerate(ids):
            seen += stream.push(number)
            whole = tokenizer.bytes_of(ids[: place + 1])
            assert text.startswith(seen)
            assert len(whole) - len(seen.encode()) < 4
        assert stream.finish() == ""
        assert seen == text

    check()


def test_an_emoji_of_four_byte_tokens_comes_whole_with_the_last(tokenizer):
    ids = [tokenizer.encode(bytes([byte]))[0] for byte in "\U0001f98a".encode()]
    assert pieces(tokenizer, ids) == ["", "", "", "\U0001f98a", ""]


def test_a_broken_character_becomes_one_replacement_once_that_is_sure(tokenizer):
    first, second = (tokenizer.encode(bytes([byte]))[0] for byte in b"\xe2\x82")
    letter = tokenizer.encode("a")[0]
    assert pieces(tokenizer, [first, second, letter]) == ["", "", "\ufffda", ""]
    assert pieces(tokenizer, [first, second]) == ["", "", "\ufffd"]

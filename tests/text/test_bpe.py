"""Training a vocabulary: against a slow oracle, deterministic, complete."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from tinsmith.core.errors import UserError
from tinsmith.core.parse import parse
from tinsmith.text.bpe import MIN_VOCAB_SIZE, train_bpe
from tinsmith.text.config import TokenizerConfig
from tinsmith.text.tokenizer import SPECIALS

ALPHABET = {
    character: len(SPECIALS) + place
    for place, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
}


def words(tokenizer, text):
    """The words of a text, as ids of single bytes; merges never cross their borders."""
    splitter = tokenizers.Tokenizer.from_str(tokenizer.to_json()).pre_tokenizer
    return [
        tuple(ALPHABET[character] for character in word)
        for word, _ in splitter.pre_tokenize_str(text)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_merges_and_ids_are_those_of_the_slow_oracle(slow_bpe, seed):
    chance = random.Random(seed)
    parts = ["a", "b", "ab ", "aaa", "c", "\n", "\u00e9", " ", "the ", "12", "()", "\u4e2d"]
    text = "".join(chance.choice(parts) for _ in range(chance.choice([20, 200, 1000])))
    trained = train_bpe([text], MIN_VOCAB_SIZE + 40)
    learned = slow_bpe.train(words(trained, text), MIN_VOCAB_SIZE, 40)
    model = json.loads(trained.to_json())["model"]
    vocabulary = model["vocab"]
    assert [(vocabulary[left], vocabulary[right]) for left, right in model["merges"]] == learned
    other = "".join(chance.choice(parts) for _ in range(100))
    expected = [
        number
        for word in words(trained, other)
        for number in slow_bpe.encode(word, learned, MIN_VOCAB_SIZE)
    ]
    assert trained.encode(other) == expected


def test_the_same_text_gives_the_same_file_in_another_process(corpus):
    code = "import sys, json; from tinsmith.text.bpe import train_bpe;"
    code += "print(train_bpe(json.load(sys.stdin), 700).fingerprint())"
    prints = {
        subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(corpus),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for _ in range(3)
    }
    assert prints == {train_bpe(corpus, 700).fingerprint()}


def test_a_vocabulary_has_the_size_requested_for_all_bytes_and_the_specials_first(corpus):
    for size in (MIN_VOCAB_SIZE, 300, 777):
        trained = train_bpe(corpus, size)
        assert trained.vocab_size == size
        vocabulary = json.loads(trained.to_json())["model"]["vocab"]
        assert sorted(vocabulary.values()) == list(range(size))
        assert [name for name, number in vocabulary.items() if number < 16] == list(SPECIALS)
        assert {name: vocabulary[name] for name in ALPHABET} == ALPHABET


def test_a_text_with_nothing_left_to_merge_gives_fewer_ids():
    assert train_bpe(["abab"], 1000).vocab_size == MIN_VOCAB_SIZE + 2
    assert train_bpe([], 1000).vocab_size == MIN_VOCAB_SIZE


@pytest.mark.parametrize("size", [0, MIN_VOCAB_SIZE - 1])
def test_a_vocabulary_too_small_for_bytes_and_specials_is_refused(size):
    with pytest.raises(UserError, match=rf"tokenizer.train.vocab_size: {size} is too small.*272"):
        train_bpe(["a"], size)


def test_special_names_in_the_training_text_are_text(corpus):
    text = "<|im_end|><think>" * 50
    trained = train_bpe([text], 400)
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert min(ids) >= len(SPECIALS)
    assert len(ids) < len(text) / 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The fox, 1234!", ["The", " fox", ",", " ", "1", "2", "3", "4", "!"]),
        ("don't", ["don", "'t"]),
        ("if x:\n    return y", ["if", " x", ":\n", "   ", " return", " y"]),
        ("a\n\n  b", ["a", "\n\n", " ", " b"]),
        ("self._name", ["self", "._", "name"]),
        ("e\u0301t\u00e9", ["e\u0301t\u00e9"]),
        ("x   ", ["x", "   "]),
    ],
)
def test_words_are_cut_where_they_should_be(tokenizer, text, expected):
    splitter = tokenizers.Tokenizer.from_str(tokenizer.to_json()).pre_tokenizer
    bounds = [bounds for _, bounds in splitter.pre_tokenize_str(text)]
    assert [text[start:stop] for start, stop in bounds] == expected


@pytest.mark.parametrize("data", [{}, {"train": {"vocab_size": 500}, "path": "x"}])
def test_a_tokenizer_section_is_either_trained_or_taken(data):
    with pytest.raises(UserError, match=r"exactly one of `tokenizer.train`"):
        parse(TokenizerConfig, data, "r.yaml")


def test_a_tokenizer_section_reads_large_numbers():
    config = parse(TokenizerConfig, {"train": {"vocab_size": "6.4k", "max_bytes": "1e6"}})
    assert (config.train.vocab_size, config.train.max_bytes) == (6400, 1_000_000)
    assert parse(TokenizerConfig, {"train": {}}).train.vocab_size == 6400
    assert parse(TokenizerConfig, {"path": "gpt2"}).path == "gpt2"


def test_D14_ordinary_text_gives_the_same_tokenizer_as_without_a_cut(monkeypatch):
    folder = os.environ.get("TINSMITH_DATA")
    files = sorted(Path(folder).rglob("*.jsonl"))[:4] if folder else [Path(__file__)]
    lines = [
        line[:3000]
        for file in files
        for line in file.read_text(encoding="utf-8")[:300_000].splitlines()
    ]
    cut = train_bpe(lines, 1500)
    monkeypatch.setattr("tinsmith.text.bpe._CUT_PATTERN", r"[\s\S]+")
    assert train_bpe(lines, 1500).to_json() == cut.to_json()


def test_D14_training_time_is_linear_in_the_longest_word():
    chance = random.Random(0)

    def seconds(length):
        text = "".join(chance.choices("ACGT", k=length))
        start = time.process_time()
        train_bpe([text], 1024)
        return time.process_time() - start

    assert seconds(400_000) < 24 * seconds(50_000) + 0.5  # 8 if linear, 64 if quadratic

import importlib.util
import inspect
import json
import textwrap
from pathlib import Path

import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from tinsmith.text.bpe import train_bpe
from tinsmith.text.tokenizer import SPECIALS, Tokenizer

ORACLES = Path(__file__).parents[1] / "oracles"

REAL = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
AWKWARD = st.sampled_from(
    [
        *SPECIALS,
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_",
        "|>",
        "<",
        "\u2581",
        "<0x41>",
        "<s>",
        "  ",
        "\n\n",
        "\r\n",
        "\x00",
        "e\u0301",
        "\u00e9",
        "\ufb01",
        "\u4e2d\u6587",
        "\U0001f469\u200d\U0001f4bb",
        "\ufdd0",
        "1234",
        "don't",
        "\u2028",
        "\u3000",
    ]
)


@pytest.fixture(scope="session")
def any_text() -> st.SearchStrategy[str]:
    """Texts of any characters, rich in what tokenizers and templates stumble over."""
    return st.lists(st.one_of(REAL, AWKWARD), max_size=6).map("".join)


@pytest.fixture(scope="session")
def any_bytes() -> st.SearchStrategy[bytes]:
    """Bytes of any kind: text, broken text and noise, one after the other."""
    pieces = st.one_of(
        st.binary(max_size=20),
        REAL.map(str.encode),
        AWKWARD.map(str.encode),
        st.sampled_from([b"\xe2\x82", b"\xff", b"\xf0\x9f", b"\xc0\xaf", b"\xed\xa0\x80"]),
    )
    return st.lists(pieces, max_size=6).map(b"".join)


@pytest.fixture(scope="session")
def slow_bpe():
    """The byte-pair encoding of tests/oracles, written to be read."""
    spec = importlib.util.spec_from_file_location("slow_bpe", ORACLES / "bpe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Some code, some prose, some of other scripts."""
    prose = "The fox said: don't go, it's 1234 steps.\n\nStill, the hen went.\n" * 5
    others = "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \U0001f600 na\u00efve caf\u00e9 "
    others = (others + "\u041f\u0440\u0438\u0432\u0435\u0442\n") * 5
    return [inspect.getsource(textwrap), inspect.getsource(json), prose, others]


@pytest.fixture(scope="session")
def tokenizer(corpus) -> Tokenizer:
    """One of our own, small."""
    return train_bpe(corpus, 800)


@pytest.fixture(scope="session")
def gpt2_folder(corpus, tmp_path_factory) -> Path:
    """An old GPT-2 folder: vocab.json and merges.txt, no tokenizer.json."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    made.train_from_iterator(corpus, trainer)
    folder = tmp_path_factory.mktemp("gpt2")
    made.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary["<|endoftext|>"] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "GPT2Tokenizer",
                "bos_token": "<|endoftext|>",
                "eos_token": "<|endoftext|>",
            }
        )
    )
    return folder


@pytest.fixture(scope="session")
def llama_json() -> str:
    """A tokenizer.json as of Llama 2: SentencePiece's spelling, byte fallback, a space in front."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", *"abcdefghijklmnopqrstuvwxyz.<>|_", "\u00e9"]
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("\u2581", "the"),
        ("\u2581", "\u2581"),
        ("<", "s"),
        ("<s", ">"),
    ]
    pieces += [left + right for left, right in merges if left + right not in pieces]
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=merges,
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens([AddedToken(name, special=True) for name in pieces[:3]])
    return made.to_str()


@pytest.fixture(scope="session")
def metaspace_json(llama_json) -> str:
    """The same as Mistral writes it: no normaliser, a Metaspace pre-tokenizer."""
    changed = json.loads(llama_json) | {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": "first",
            "split": False,
        },
    }
    return json.dumps(changed)


@pytest.fixture(scope="session")
def qwen_json(corpus) -> str:
    """A byte-level tokenizer with what makes others lossy: NFC, a prefix space, truncation."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    made.train_from_iterator(corpus, trainer)
    made.enable_truncation(5)
    made.enable_padding()
    return made.to_str()


@pytest.fixture(scope="session")
def families(tokenizer, gpt2_folder, llama_json, metaspace_json, qwen_json) -> dict[str, Tokenizer]:
    """Tokenizers of every family that can write all bytes."""
    always = metaspace_json.replace('"prepend_scheme": "first"', '"prepend_scheme": "always"')
    return {
        "own": tokenizer,
        "gpt2": Tokenizer.load(gpt2_folder),
        "llama": Tokenizer(llama_json, bos="<s>", eos="</s>"),
        "metaspace": Tokenizer(metaspace_json, bos="<s>", eos="</s>"),
        "metaspace_always": Tokenizer(always, bos="<s>", eos="</s>"),
        "qwen": Tokenizer(qwen_json),
    }

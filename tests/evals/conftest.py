"""Small models and tokenizers for evaluations."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tinsmith.nn.model import LM, ModelConfig
from tinsmith.text.bpe import train_bpe
from tinsmith.text.tokenizer import Tokenizer

TEXT = "the cat sat on the mat and the dog ran off. " * 20


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT], 320)


def section(vocab_size: int, dim: int, **model: Any) -> dict[str, Any]:
    mixer = {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8}
    layer = {"mixer": mixer, "feed_forward": {"kind": "swiglu", "hidden_dim": 48}}
    return {"vocab_size": vocab_size, "dim": dim, "depth": 2, "pattern": [layer]} | model


@pytest.fixture
def make_lm(tokenizer: Tokenizer) -> Callable[..., LM]:
    """(model keys) -> a float64 model, far from its first weights, in training mode with dropout:
    only evaluation mode gives the same numbers twice.
    """

    def made(**model: Any) -> LM:
        torch.manual_seed(1)
        dropout = {"embedding": 0.5, "residual": 0.5}
        base = section(tokenizer.vocab_size, 32, max_seq_len=64, dropout=dropout)
        lm = LM(ModelConfig.from_dict(base | model)).double()
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        return lm.train()

    return made


@pytest.fixture
def bigrams(tokenizer: Tokenizer) -> Callable[[list[list[int]]], LM]:
    """(sequences of ids) -> a model that finds every pair of neighbours in them e^10 times as
    likely as any other.
    """

    def made(lines: list[list[int]]) -> LM:
        size = tokenizer.vocab_size
        lm = LM(ModelConfig.from_dict(section(size, size, tie_embeddings=False)))
        with torch.no_grad():
            for parameter in lm.blocks.parameters():  # type: ignore[attr-defined]
                parameter.zero_()
            lm.embed.weight.copy_(torch.eye(size))
            lm.head.weight.zero_()
            for line in lines:
                for before, after in itertools.pairwise(line):
                    lm.head.weight[after, before] = 10 / size**0.5
        return lm

    return made


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """(rows, name) -> a .jsonl file with them; a str is written as it is."""

    def written(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return written

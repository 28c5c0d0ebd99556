"""Small models, and the slowest way to generate: a full forward for every token."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tinsmith.infer.engine import Engine, Event
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.text.bpe import train_bpe
from tinsmith.text.tokenizer import Tokenizer

VOCAB = 48

MIXERS: dict[str, list[dict[str, Any]]] = {
    "grouped": [{"heads": 4, "kv_heads": 2}],
    "window": [{"heads": 4, "window": 5}],
    "both, with sinks": [{"heads": 4, "window": 5, "sinks": True}, {"heads": 4, "kv_heads": 1}],
    "value residual": [{"heads": 4, "kv_heads": 2, "value_residual": True, "qk_norm": True}],
}


@pytest.fixture
def small() -> Callable[..., LM]:
    """(mixers, dtype, keys of the model) -> a model in eval mode whose parameters are all stirred,
    so that its greedy texts do not simply repeat.
    """

    def made(
        mixers: list[dict[str, Any]] = MIXERS["grouped"],
        dtype: torch.dtype = torch.float64,
        **model: Any,
    ) -> LM:
        torch.manual_seed(0)
        feed_forward = {"kind": "swiglu", "hidden_dim": 48}
        pattern = [{"mixer": {"kind": "gqa"} | m, "feed_forward": feed_forward} for m in mixers]
        section = {"vocab_size": VOCAB, "dim": 32, "depth": 3, "max_seq_len": 128}
        section |= {"tie_embeddings": False, "pattern": pattern}
        lm = LM(ModelConfig.from_dict(section | model)).to(dtype).eval()
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        return lm

    return made


@pytest.fixture(params=MIXERS)
def lm(request: pytest.FixtureRequest, small: Callable[..., LM]) -> LM:
    """A float64 model of each kind of cache."""
    return small(MIXERS[request.param])


@pytest.fixture
def greedily() -> Callable[[LM, list[int], int], list[int]]:
    """(model, prompt, count) -> ids, each the argmax of a full forward of all before it."""

    @torch.no_grad()
    def generated(lm: LM, prompt: list[int], count: int) -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(lm(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    return generated


@pytest.fixture
def draw() -> Callable[[int, int], list[int]]:
    """(length, seed) -> a prompt."""

    def ids(length: int, seed: int = 0) -> list[int]:
        made = torch.Generator().manual_seed(100 * length + seed)
        return torch.randint(0, VOCAB, (length,), generator=made).tolist()

    return ids


@pytest.fixture
def finished() -> Callable[[Engine], dict[int, list[Event]]]:
    """Run an engine to its end: the events of every request, in order."""

    def ran(engine: Engine) -> dict[int, list[Event]]:
        events: dict[int, list[Event]] = {}
        for event in engine.run():
            events.setdefault(event.request_id, []).append(event)
        return events

    return ran


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A small one, with characters of one to four bytes in its corpus."""
    return train_bpe(["def f(x):\n    return x + 1\n", "naïve café 你好 😀 the end. " * 3], 320)

"""`tinsmith quickstart`: the whole story on this machine, on text that every Python has."""

import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

from tinsmith.config import RunConfig, from_dict, merge
from tinsmith.core.errors import UserError
from tinsmith.core.log import say
from tinsmith.core.parse import read_yaml
from tinsmith.core.units import duration
from tinsmith.hub.load import load
from tinsmith.infer.generate import stream
from tinsmith.train.folder import run_folder
from tinsmith.train.precision import fastest
from tinsmith.train.trainer import train
from tinsmith.verbs.generate import prompt_ids, sampling

QUESTIONS = (
    "Write a Python function `is_even(n)`. Return True if n is even.",
    "Implement the method `Stack.push(self, item)` in Python. Add an item to the stack.",
    "How would you write the function `read_text(path)` in Python? Return the text of a file.",
)
ANSWER_TOKENS = 120


def quickstart(tiny: bool, name: str) -> None:
    """Pretrain, fine-tune, answer; two runs, `NAME` (the base model) and `NAME-chat`."""
    began = time.monotonic()
    name = _free(name)
    say(f"Part 1 of 3: a tokenizer and a model of Python's own source code ({name})")
    base = train(_recipe("pretrain", tiny, {}), name, recipe="quickstart")
    say(f"\nPart 2 of 3: the same model learns to answer ({name}-chat)")
    chat = train(_recipe("chat", tiny, {"init_from": str(base)}), f"{name}-chat")
    say("\nPart 3 of 3: three questions")
    _answer(chat)
    said = f"\nDone in {duration(time.monotonic() - began)}. What is there now:"
    say(f"{said}\n" + "\n".join(f"  {line}" for line in _what_now(base, chat)))


def _free(name: str) -> str:
    """The name, or the name with the first number for which neither run exists."""
    for number in range(1, 10_000):
        candidate = name if number == 1 else f"{name}-{number}"
        if not any(run_folder(each).exists() for each in (candidate, f"{candidate}-chat")):
            return candidate
    raise UserError(f"--name {name}: too many runs of this name; choose another")


def _recipe(part: str, tiny: bool, extra: dict[str, Any]) -> RunConfig:
    """A recipe of the package, with its own `tiny` changes on top if asked."""
    where = resources.files("tinsmith.verbs") / "quickstart_recipes" / f"{part}.yaml"
    data = read_yaml(Path(str(where)))
    smaller = data.pop("tiny")
    chosen = merge(data, smaller if tiny else {"train": {"precision": fastest()}})
    return from_dict(chosen | extra, f"quickstart {part}")


def _answer(chat: Path) -> None:
    lm, tokenizer = load(chat)
    assert tokenizer is not None
    for question in QUESTIONS:
        say(f"\n> {question}")
        ids = prompt_ids(tokenizer, question, True)
        settings = sampling(temperature=0.6, top_p=0.9, repetition_penalty=1.1, seed=0)
        for piece in stream(lm, tokenizer, ids, sampling=settings, max_new=ANSWER_TOKENS):
            sys.stdout.write(piece)
            sys.stdout.flush()
        say("")


def _what_now(base: Path, chat: Path) -> list[str]:
    lines = {
        f"{chat}/loss.png, samples.md, metrics.jsonl": "how it learned",
        f"{chat}/final": "opens with transformers; README.md is its card",
        f'tinsmith generate {base} -p "def main():"': "the base model goes on writing",
        f"tinsmith chat {chat}": "talk to it",
        "tinsmith runs": "all runs so far",
    }
    return [f"{what:<60} {why}" for what, why in lines.items()]

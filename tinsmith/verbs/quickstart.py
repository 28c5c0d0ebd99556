"""`tinsmith quickstart`: train, fine-tune and align small models on this machine.

The data is the source code of Python's standard library, and generated sums.
"""

import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from tinsmith.config import RunConfig, from_dict, merge
from tinsmith.core.errors import UserError
from tinsmith.core.log import print_line
from tinsmith.core.parse import read_yaml
from tinsmith.core.units import format_duration
from tinsmith.data.loader.loader import open_dataset
from tinsmith.data.prepare.prepare import prepare
from tinsmith.hub.load import load
from tinsmith.infer.generate import stream
from tinsmith.train.precision import fastest_precision
from tinsmith.train.run_dir import run_folder, runs_root
from tinsmith.train.trainer import train
from tinsmith.verbs.generate import prompt_ids, sampling_params


class Stage(NamedTuple):
    """One run of the quickstart."""

    recipe: str
    """Name of its file in `quickstart_recipes`."""
    ending: str
    """Suffix of the run's name."""
    story: str
    start: str | None = None
    """Recipe of the stage whose model it starts from."""


STAGES = (
    Stage("pretrain", "", "a tokenizer and a model of Python's own source code"),
    Stage("chat", "-chat", "the same model learns to answer", start="pretrain"),
    Stage("sums", "-sums", "a smaller model learns sums whose labels are wrong 60 % of the time"),
    Stage(
        "dpo", "-dpo", "DPO: it learns to prefer correct sums to nearly correct ones", start="sums"
    ),
    Stage(
        "grpo", "-grpo", "GRPO: instead, it learns from its own answers, each checked", start="sums"
    ),
)
EXAM_LABELS = {"sums": "fine-tuning", "dpo": "DPO", "grpo": "GRPO"}
"""Stages whose accuracy on sums is measured -> label of the result."""
QUESTIONS = (
    "Write a Python function `is_even(n)`. Return True if n is even.",
    "Implement the method `Stack.push(self, item)` in Python. Add an item to the stack.",
    "How would you write the function `read_text(path)` in Python? Return the text of a file.",
)
ANSWER_TOKENS = 120


def quickstart(tiny: bool, name: str) -> None:
    """Train every stage in a run named NAME plus suffix, then print answers and accuracies."""
    began = time.monotonic()
    name = _free(name)
    runs: dict[str, Path] = {}
    for number, part in enumerate(STAGES, 1):
        run = name + part.ending
        print_line(f"\nPart {number} of {len(STAGES)}: {part.story} ({run})")
        start = {} if part.start is None else {"init_from": str(runs[part.start])}
        runs[part.recipe] = train(_recipe(part.recipe, tiny, start), run, recipe="quickstart")
    print_line("\nThree prompts to the model of part 2")
    _answer(runs["chat"])
    print_line("\nAccuracy on held-out sums, greedy decoding, of the models of parts 3 to 5")
    for recipe, learned in EXAM_LABELS.items():
        exam = _recipe("grpo", tiny, {"init_from": str(runs[recipe])})
        print_line(f" {f'after {learned}':<18} {_mark(runs[recipe], exam):>4.0%} right")
    summary = f"\nDone in {format_duration(time.monotonic() - began)}. Results and next steps:"
    print_line(f"{summary}\n" + "\n".join(f"  {line}" for line in _what_now(runs)))


def _free(name: str) -> str:
    """Return the name, or the name with the first number for which no run exists."""
    for number in range(1, 10_000):
        candidate = name if number == 1 else f"{name}-{number}"
        if not any(run_folder(candidate + part.ending).exists() for part in STAGES):
            return candidate
    raise UserError(f"--name {name}: too many runs of this name; choose another")


def _recipe(part: str, tiny: bool, extra: dict[str, Any]) -> RunConfig:
    """Load a recipe of the package, with its `tiny` overrides if requested. bf16 becomes fp32 on
    machines where bf16 is slower.
    """
    where = resources.files("tinsmith.verbs") / "quickstart_recipes" / f"{part}.yaml"
    data = read_yaml(Path(str(where)))
    smaller = data.pop("tiny")
    chosen = merge(data, smaller) if tiny else data
    if chosen["train"]["precision"] == "bf16":
        chosen["train"]["precision"] = fastest_precision()
    return from_dict(chosen | extra, f"quickstart {part}")


def _answer(chat: Path) -> None:
    lm, tokenizer = load(chat)
    assert tokenizer is not None
    for question in QUESTIONS:
        print_line(f"\n> {question}")
        ids = prompt_ids(tokenizer, question, True)
        settings = sampling_params(temperature=0.6, top_p=0.9, repetition_penalty=1.1, seed=0)
        for piece in stream(
            lm, tokenizer, ids, sampling_params=settings, max_new_tokens=ANSWER_TOKENS
        ):
            sys.stdout.write(piece)
            sys.stdout.flush()
        print_line("")


def _mark(run: Path, exam: RunConfig) -> float:
    """Return the accuracy of a model on the held-out sums of the exam."""
    lm, tokenizer = load(run)
    assert tokenizer is not None
    shape, context = exam.objective.data_format, exam.train.seq_len
    place = runs_root() / ".data"
    prepared = prepare(exam.data, tokenizer, shape, place, lambda line: None, seq_len=context)
    held_back = open_dataset(prepared.folder, shape, "validation", context, exam.train.seed)
    objective = exam.objective.build()
    objective.prepare(lm, tokenizer)
    return objective.evaluate(lm, held_back, exam.eval.max_samples)["reward"]


def _what_now(runs: dict[str, Path]) -> list[str]:
    base, chat, grpo = runs["pretrain"], runs["chat"], runs["grpo"]
    lines = {
        f"{chat}/loss.png, samples.md, metrics.jsonl": "how it learned",
        f"{chat}/final": "opens with transformers; README.md is its card",
        f'tinsmith generate {base} -p "def main():"': "the base model continues a text",
        f"tinsmith chat {chat}": "talk to it",
        f"tinsmith chat {grpo} --temperature 0": "ask it: What is 7 + 8?",
        "tinsmith runs": "all runs so far",
    }
    return [f"{what:<60} {why}" for what, why in lines.items()]

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
from tinsmith.core.units import format_duration
from tinsmith.core.yamlfile import read_yaml
from tinsmith.data.loader.loader import open_dataset
from tinsmith.data.prepare.prepare import prepare
from tinsmith.hub.load import load
from tinsmith.infer.generate import stream
from tinsmith.train.run_dir import run_folder, runs_root
from tinsmith.train.trainer import train
from tinsmith.verbs.generate import prompt_ids, sampling_params


class Stage(NamedTuple):
    """One run of the quickstart."""

    recipe: str
    """Name of its file in `quickstart_recipes`."""
    suffix: str
    """Suffix of the run's name."""
    description: str
    init_from: str | None = None
    """Recipe of the stage whose model it starts from."""


STAGES = (
    Stage("pretrain", "", "a tokenizer and a model of Python's own source code"),
    Stage("chat", "-chat", "the same model learns to answer", init_from="pretrain"),
    Stage("sums", "-sums", "a smaller model learns sums whose labels are wrong 60 % of the time"),
    Stage(
        "dpo",
        "-dpo",
        "DPO: it learns to prefer correct sums to nearly correct ones",
        init_from="sums",
    ),
    Stage(
        "grpo",
        "-grpo",
        "GRPO: instead, it learns from rewards for its own answers",
        init_from="sums",
    ),
)
EVAL_LABELS = {"sums": "fine-tuning", "dpo": "DPO", "grpo": "GRPO"}
"""Labels of the stages whose accuracy on sums is measured, by recipe."""
QUESTIONS = (
    "Write a Python function `is_even(n)`. Return True if n is even.",
    "Implement the method `Stack.push(self, item)` in Python. Add an item to the stack.",
    "How would you write the function `read_text(path)` in Python? Return the text of a file.",
)
MAX_NEW_TOKENS = 120


def quickstart(tiny: bool, name: str) -> None:
    """Train every stage in a run named NAME plus suffix, then print answers and accuracies."""
    start = time.monotonic()
    name = _unused_name(name)
    runs: dict[str, Path] = {}
    for number, stage in enumerate(STAGES, 1):
        run = name + stage.suffix
        print_line(f"\nPart {number} of {len(STAGES)}: {stage.description} ({run})")
        extra = {} if stage.init_from is None else {"init_from": str(runs[stage.init_from])}
        config = _load_recipe(stage.recipe, tiny, extra)
        runs[stage.recipe] = train(config, run, recipe="quickstart")
    print_line("\nThree prompts to the model of part 2")
    _print_answers(runs["chat"])
    print_line("\nAccuracy on held-out sums, greedy decoding, of the models of parts 3 to 5")
    for recipe, label in EVAL_LABELS.items():
        config = _load_recipe("grpo", tiny, {"init_from": str(runs[recipe])})
        print_line(f" {f'after {label}':<18} {_accuracy(runs[recipe], config):>4.0%} right")
    summary = f"\nDone in {format_duration(time.monotonic() - start)}. Results and next steps:"
    print_line(f"{summary}\n" + "\n".join(f"  {line}" for line in _next_steps(runs)))


def _unused_name(name: str) -> str:
    """Return the name, or the name with the first number for which no run exists."""
    for number in range(1, 10_000):
        candidate = name if number == 1 else f"{name}-{number}"
        if not any(run_folder(candidate + stage.suffix).exists() for stage in STAGES):
            return candidate
    raise UserError(f"--name {name}: too many runs of this name; choose another")


def _load_recipe(name: str, tiny: bool, extra: dict[str, Any]) -> RunConfig:
    """Load a recipe of the package, with its overrides under `tiny` if requested."""
    path = resources.files("tinsmith.verbs") / "quickstart_recipes" / f"{name}.yaml"
    data = read_yaml(Path(str(path)))
    tiny_overrides = data.pop("tiny")
    if tiny:
        data = merge(data, tiny_overrides)
    return from_dict(data | extra, f"quickstart {name}")


def _print_answers(run: Path) -> None:
    """Print the answers of a chat model to `QUESTIONS` while they are generated."""
    lm, tokenizer = load(run)
    assert tokenizer is not None
    for question in QUESTIONS:
        print_line(f"\n> {question}")
        ids = prompt_ids(tokenizer, question, True)
        params = sampling_params(temperature=0.6, top_p=0.9, repetition_penalty=1.1, seed=0)
        for increment in stream(
            lm, tokenizer, ids, sampling_params=params, max_new_tokens=MAX_NEW_TOKENS
        ):
            sys.stdout.write(increment)
            sys.stdout.flush()
        print_line("")


def _accuracy(run: Path, config: RunConfig) -> float:
    """Return the accuracy of a model on the validation prompts of a recipe."""
    lm, tokenizer = load(run)
    assert tokenizer is not None
    data_format, seq_len = config.objective.data_format, config.train.seq_len
    prepared = prepare(
        config.data,
        tokenizer,
        data_format,
        runs_root() / ".data",
        lambda line: None,
        seq_len=seq_len,
    )
    validation = open_dataset(
        prepared.folder, data_format, "validation", seq_len, config.train.seed
    )
    objective = config.objective.build()
    objective.prepare(lm, tokenizer)
    return objective.evaluate(lm, validation, config.eval.max_samples)["reward"]


def _next_steps(runs: dict[str, Path]) -> list[str]:
    """Return lines of files to read and commands to try, each with a description."""
    base, chat, grpo = runs["pretrain"], runs["chat"], runs["grpo"]
    descriptions = {
        f"{chat}/loss.png, samples.md, metrics.jsonl": "loss curve, samples, metrics",
        f"{chat}/final": "opens with transformers; README.md is its model card",
        f'tinsmith generate {base} -p "def main():"': "the base model continues a text",
        f"tinsmith chat {chat}": "chat with the model",
        f"tinsmith chat {grpo} --temperature 0": "try: What is 7 + 8?",
        "tinsmith runs": "list all runs",
    }
    return [f"{item:<60} {description}" for item, description in descriptions.items()]

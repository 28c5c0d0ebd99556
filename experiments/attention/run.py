"""Compares mixers and residual connections in loss, recall, cache size and time.

    python -m experiments.attention.run [--seeds 3] [--text FILE_OR_FOLDER] [--only hybrid]
    python -m experiments.attention.run --speed         (on a quiet machine, a few minutes)

Every mixer is combined with every residual connection, with equal numbers of parameters and tokens
and by default three seeds. Measured are bits per byte on real text, recall of a needle by depth and
length and of several pairs, and bytes of the KV cache. Results are written to results.json after
each case, and cases in that file are not run again, so an interrupted experiment can be continued.
`--speed` times a training step of all cases in turns and writes speed.json. At the end page.py
writes README.md and its pictures.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from experiments.attention import cases, page, recall
from experiments.common import Results, parser, temporary_runs
from tinsmith import LM, ModelConfig
from tinsmith.config import from_dict
from tinsmith.core.log import read_metrics
from tinsmith.optim.build import Optimizers
from tinsmith.optim.config import OptimConfig
from tinsmith.train.trainer import train

HERE = Path(__file__).parent
SPEED = HERE / "speed.json"
TEXT = {"vocab_size": 1024, "dim": 128, "depth": 4, "max_seq_len": 1024, "rope": {"theta": 1e4}}
TEXT_REACH, TEXT_PARAMETERS = 64, 1_000_000
SEQ_LEN, BATCH_SIZE, STEPS = 256, 8, 200
RECALL = {"vocab_size": recall.VOCABULARY, "dim": 64, "depth": 2, "max_seq_len": 1024}
RECALL_REACH, RECALL_PARAMETERS, RECALL_STEPS, LENGTH = 32, 150_000, 700, 128
DEPTHS, LENGTHS, PAIRS = (0.0, 0.25, 0.5, 0.75, 1.0), (64, 128, 256), (2, 4, 8)


def train_on_text(section: dict[str, Any], seed: int, text: str) -> float:
    """Train on text and return bits per byte on held-out text."""
    recipe = {
        "model": section,
        "tokenizer": {"train": {"vocab_size": 1024}},
        "data": {"kind": "text", "path": text},
        "objective": {"kind": "pretrain"},
        "optim": {"schedule": {"kind": "wsd", "warmup": 20, "decay": 0.4}},
        "train": {
            "seq_len": SEQ_LEN,
            "batch_size": BATCH_SIZE,
            "steps": STEPS,
            "seed": seed,
            "precision": "fp32",
        }
        | {"save_every": STEPS, "eval_every": STEPS, "sample_every": STEPS},
        "eval": {"max_samples": 256, "max_new_tokens": 8},
        "log": {"every": 20},
    }
    run = train(from_dict(recipe), f"{time.time_ns()}")
    metrics = read_metrics(run / "metrics.jsonl")
    return [record["bpb"] for record in metrics if record["kind"] == "eval"][-1]


def train_on_recall(section: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train on recall; return loss, accuracy by needle length and depth, and by number of pairs."""
    torch.manual_seed(seed)
    lm = LM(ModelConfig.from_dict(section))
    loss = recall.learn(lm, RECALL_STEPS, seed)
    needle = {
        f"{length} {depth}": recall.accuracy(lm, length, 1, depth)
        for length, depth in product(LENGTHS, DEPTHS)
    }
    pairs = {str(count): recall.accuracy(lm, LENGTH, count) for count in PAIRS}
    return {"loss": loss, "needle": needle, "pairs": pairs}


def cache_bytes(section: dict[str, Any]) -> int:
    """Return the bytes of the KV cache of one sequence of 1,024 tokens in all layers."""
    lm = LM(ModelConfig.from_dict(section))
    return sum(cache.nbytes() for cache in lm.new_caches(1, 1024))


def measure(mixer: str, residual: str, seed: int, text: str) -> dict[str, Any]:
    """Train a case with a seed and return its record."""
    text_model = cases.model((mixer, residual), TEXT, TEXT_REACH, TEXT_PARAMETERS)
    recall_model = cases.model((mixer, residual), RECALL, RECALL_REACH, RECALL_PARAMETERS)
    record = {
        "mixer": mixer,
        "residual": residual,
        "seed": seed,
        "parameters": cases.count(text_model),
    }
    record |= {"cache_bytes": cache_bytes(text_model), "bpb": train_on_text(text_model, seed, text)}
    return record | {"recall": train_on_recall(recall_model, seed)}


def make_step(section: dict[str, Any]) -> Callable[[], None]:
    """Return a function that trains the text model for one step on random tokens."""
    torch.manual_seed(0)
    lm = LM(ModelConfig.from_dict(section)).train()
    optimizers = Optimizers.build(lm, None, OptimConfig())
    ids = torch.randint(section["vocab_size"], (BATCH_SIZE, SEQ_LEN + 1))

    def step() -> None:
        out = lm(ids[:, :-1])
        loss = F.cross_entropy(out.logits.flatten(0, 1), ids[:, 1:].flatten())
        (loss + sum(out.losses.values())).backward()
        optimizers.step()
        optimizers.zero_grad()

    return step


def speed(rounds: int = 10) -> dict[str, float]:
    """Return the median seconds of a step by "mixer residual", all cases in turns."""
    names = list(product(cases.MIXERS, cases.RESIDUALS))
    steps = {n: make_step(cases.model(n, TEXT, TEXT_REACH, TEXT_PARAMETERS)) for n in names}
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {" ".join(name): statistics.median(values) for name, values in seconds.items()}


def default_text() -> str:
    folder = Path(os.environ.get("TINSMITH_DATA", "")) / "tinystories_sample" / "train.txt"
    if not folder.exists():
        raise SystemExit("no text: give --text, or set $TINSMITH_DATA")
    return str(folder)


def main() -> None:
    options = parser(__doc__, cases.MIXERS)
    options.add_argument("--text")
    options.add_argument("--speed", action="store_true")
    arguments = options.parse_args()
    results = Results(HERE, "seed", "mixer", "residual")
    if arguments.speed:
        SPEED.write_text(json.dumps(speed(), indent=1) + "\n", encoding="utf-8")
    else:
        text = arguments.text or default_text()
        with temporary_runs():
            residuals = list(cases.RESIDUALS)
            for seed, mixer, residual in results.missing(
                range(arguments.seeds), arguments.only, residuals
            ):
                results.add(measure(mixer, residual, seed, text))
    page.write(results.records, HERE)


if __name__ == "__main__":
    main()

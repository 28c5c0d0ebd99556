"""What sparse attention and several residual streams gain, and what they cost.

    python -m experiments.attention.run [--seeds 3] [--text FILE_OR_FOLDER] [--only hybrid]
    python -m experiments.attention.run --speed         (on a quiet machine, a few minutes)

Every mixer with every residual, equal parameters and tokens, by default three seeds: bits per byte
on real text; recall of a needle by depth and length, and of several pairs; bytes of a cache.
Results go to results.json as they come, and a case that is there is not run again, so an
interrupted run goes on. `--speed` times a training step of all cases in turns, for speed.json. At
the end page.py draws README.md and its pictures.
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
from experiments.common import Results, parser, workplace
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
CONTEXT, ROWS, STEPS = 256, 8, 200
RECALL = {"vocab_size": recall.VOCABULARY, "dim": 64, "depth": 2, "max_seq_len": 1024}
RECALL_REACH, RECALL_PARAMETERS, RECALL_STEPS, LENGTH = 32, 150_000, 700, 128
DEPTHS, LENGTHS, PAIRS = (0.0, 0.25, 0.5, 0.75, 1.0), (64, 128, 256), (2, 4, 8)


def on_text(section: dict[str, Any], seed: int, text: str) -> float:
    """Bits per byte after training."""
    recipe = {
        "model": section,
        "tokenizer": {"train": {"vocab_size": 1024}},
        "data": {"kind": "text", "path": text},
        "objective": {"kind": "pretrain"},
        "optim": {"schedule": {"kind": "wsd", "warmup": 20, "decay": 0.4}},
        "train": {
            "seq_len": CONTEXT,
            "batch_size": ROWS,
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
    return [row["bpb"] for row in metrics if row["kind"] == "eval"][-1]


def on_recall(section: dict[str, Any], seed: int) -> dict[str, Any]:
    """Accuracies by length and depth of a needle, and by number of pairs."""
    torch.manual_seed(seed)
    lm = LM(ModelConfig.from_dict(section))
    loss = recall.learn(lm, RECALL_STEPS, seed)
    needle = {
        f"{length} {depth}": recall.accuracy(lm, length, 1, depth)
        for length, depth in product(LENGTHS, DEPTHS)
    }
    pairs = {str(number): recall.accuracy(lm, LENGTH, number) for number in PAIRS}
    return {"loss": loss, "needle": needle, "pairs": pairs}


def cache_bytes(section: dict[str, Any]) -> int:
    """Of one row of 1,024 tokens, all layers."""
    lm = LM(ModelConfig.from_dict(section))
    return sum(cache.nbytes() for cache in lm.new_caches(1, 1024))


def case(mixer: str, residual: str, seed: int, text: str) -> dict[str, Any]:
    """All that is measured of one model and seed."""
    long = cases.model((mixer, residual), TEXT, TEXT_REACH, TEXT_PARAMETERS)
    short = cases.model((mixer, residual), RECALL, RECALL_REACH, RECALL_PARAMETERS)
    found = {"mixer": mixer, "residual": residual, "seed": seed, "parameters": cases.count(long)}
    found |= {"cache_bytes": cache_bytes(long), "bpb": on_text(long, seed, text)}
    return found | {"recall": on_recall(short, seed)}


def stepping(section: dict[str, Any]) -> Callable[[], None]:
    """One training step of the text model on random tokens."""
    torch.manual_seed(0)
    lm = LM(ModelConfig.from_dict(section)).train()
    optimizers = Optimizers.build(lm, None, OptimConfig())
    ids = torch.randint(section["vocab_size"], (ROWS, CONTEXT + 1))

    def step() -> None:
        out = lm(ids[:, :-1])
        loss = F.cross_entropy(out.logits.flatten(0, 1), ids[:, 1:].flatten())
        (loss + sum(out.losses.values())).backward()
        optimizers.step()
        optimizers.zero_grad()

    return step


def speed(rounds: int = 10) -> dict[str, float]:
    """Median seconds of a step, all cases in turns: "mixer residual" -> seconds."""
    names = list(product(cases.MIXERS, cases.RESIDUALS))
    steps = {n: stepping(cases.model(n, TEXT, TEXT_REACH, TEXT_PARAMETERS)) for n in names}
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - begun)
    return {" ".join(name): statistics.median(found) for name, found in seconds.items()}


def default_text() -> str:
    folder = Path(os.environ.get("TINSMITH_DATA", "")) / "tinystories_sample" / "train.txt"
    if not folder.exists():
        raise SystemExit("no text: give --text, or set $TINSMITH_DATA")
    return str(folder)


def main() -> None:
    words = parser(__doc__, cases.MIXERS)
    words.add_argument("--text")
    words.add_argument("--speed", action="store_true")
    requested = words.parse_args()
    results = Results(HERE, "seed", "mixer", "residual")
    if requested.speed:
        SPEED.write_text(json.dumps(speed(), indent=1) + "\n", encoding="utf-8")
    else:
        text = requested.text or default_text()
        with workplace():
            residuals = list(cases.RESIDUALS)
            for seed, mixer, residual in results.missing(
                range(requested.seeds), requested.only, residuals
            ):
                results.add(case(mixer, residual, seed, text))
    page.write(results.rows, HERE)


if __name__ == "__main__":
    main()

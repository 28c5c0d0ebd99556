"""Compares the default optimizer settings with those of MiniMind on equal data.

    python benchmarks/learning.py [--steps 400] [--seeds 3] [--text FILE_OR_FOLDER]

Text and model are the same. MiniMind's recipe (AdamW at 5e-4 on everything, no warmup, cosine to a
tenth) trains on all tokens. Tinsmith's defaults (Muon 0.02, AdamW 3e-3, WSD) train on 60 % of them
and should reach the same validation bits per byte or lower. The text is --text, else
$TINSMITH_DATA/tinystories_sample, else generated tasks.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import table, write

from tinsmith.config import from_dict
from tinsmith.core.log import read_metrics
from tinsmith.train.trainer import train

SHARE = 0.6
ADAMW = {"kind": "adamw", "lr": 5.0e-4, "betas": [0.9, 0.999], "weight_decay": 0.01}
MINIMIND_OPTIM = {
    "matrices": ADAMW,
    "others": ADAMW,
    "schedule": {"kind": "cosine", "warmup": 0, "min_lr_ratio": 0.1},
}
BATCH = {"seq_len": 256, "batch_size": 16}


def recipe(optim: dict[str, Any], steps: int, seed: int, text: str | None) -> dict[str, Any]:
    """Return a recipe of the 0.9M model of recipes/tiny with these optimizer settings."""
    return {
        "model": {
            "vocab_size": 1024,
            "dim": 128,
            "depth": 4,
            "max_seq_len": 1024,
            "pattern": [
                {
                    "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2},
                    "feed_forward": {"kind": "swiglu", "hidden_dim": 352},
                }
            ],
        },
        "tokenizer": {"train": {"vocab_size": 1024}},
        "data": {"kind": "text", "path": text} if text else {"kind": "tasks", "count": 60_000},
        "objective": {"kind": "pretrain"},
        "optim": optim,
        "train": BATCH
        | {"steps": steps, "seed": seed, "precision": "fp32"}
        | {"save_every": steps, "eval_every": steps, "sample_every": steps},
        "eval": {"max_samples": 512, "max_new_tokens": 16},
        "log": {"every": 50},
    }


def final_bpb(optim: dict[str, Any], steps: int, seed: int, text: str | None, name: str) -> float:
    """Train and return the last validation bits per byte."""
    run = train(from_dict(recipe(optim, steps, seed, text)), name)
    metrics = read_metrics(run / "metrics.jsonl")
    return [record["bpb"] for record in metrics if record["kind"] == "eval"][-1]


def default_text() -> str | None:
    folder = Path(os.environ.get("TINSMITH_DATA", "")) / "tinystories_sample" / "train.txt"
    return str(folder) if os.environ.get("TINSMITH_DATA") and folder.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens to equal bits per byte.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--text", default=default_text())
    arguments = parser.parse_args()
    fewer_steps = round(SHARE * arguments.steps)
    results: dict[str, list[float]] = {"seed's recipe, 100 %": [], "tinsmith's default, 60 %": []}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TINSMITH_RUNS"] = folder
        for seed in range(arguments.seeds):
            minimind = final_bpb(
                MINIMIND_OPTIM, arguments.steps, seed, arguments.text, f"minimind-{seed}"
            )
            tinsmith = final_bpb({}, fewer_steps, seed, arguments.text, f"tinsmith-{seed}")
            for name, value in zip(results, (minimind, tinsmith), strict=True):
                results[name].append(value)
    table(
        [
            {
                "recipe": name,
                "mean bpb": statistics.mean(values),
                "each": " ".join(f"{value:.3f}" for value in values),
            }
            for name, values in results.items()
        ]
    )
    minimind, tinsmith = results.values()
    reached = all(b <= a for a, b in zip(minimind, tinsmith, strict=True))
    print("reached in every seed" if reached else "NOT reached in every seed")
    text = Path(arguments.text).parent.name if arguments.text else "tasks"
    tokens = arguments.steps * BATCH["batch_size"] * BATCH["seq_len"]
    print(write("learning", {"text": text, "tokens": tokens, "share": SHARE, "bpb": results}))


if __name__ == "__main__":
    main()

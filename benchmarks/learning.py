"""Does the default recipe learn more from a token than the seed's?

    python benchmarks/learning.py [--steps 400] [--seeds 3] [--text FILE_OR_FOLDER]

Same text, same model. The seed's recipe (MiniMind: AdamW at 5e-4 on everything, no warm-up, cosine
to a tenth) gets all the tokens; Tinsmith's defaults (Muon 0.02, AdamW 3e-3, WSD) are planned for
60 % of them and should end at the same validation bits per byte or below. Text: what --text names,
else $TINSMITH_DATA/tinystories_sample, else generated tasks.
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
SEED_RECIPE = {
    "matrices": ADAMW,
    "others": ADAMW,
    "schedule": {"kind": "cosine", "warmup": 0, "min_lr_ratio": 0.1},
}
BATCH = {"context": 256, "rows": 16}


def recipe(optim: dict[str, Any], steps: int, seed: int, text: str | None) -> dict[str, Any]:
    """The 0.9M model of recipes/tiny, with everything but the optimizer equal."""
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


def bits(optim: dict[str, Any], steps: int, seed: int, text: str | None, name: str) -> float:
    """Train, and the last validation bits per byte."""
    run = train(from_dict(recipe(optim, steps, seed, text)), name)
    return [row["bpb"] for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "eval"][-1]


def default_text() -> str | None:
    folder = Path(os.environ.get("TINSMITH_DATA", "")) / "tinystories_sample" / "train.txt"
    return str(folder) if os.environ.get("TINSMITH_DATA") and folder.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens to equal bits per byte.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--text", default=default_text())
    arguments = parser.parse_args()
    fewer = round(SHARE * arguments.steps)
    found: dict[str, list[float]] = {"seed's recipe, 100 %": [], "tinsmith's default, 60 %": []}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TINSMITH_RUNS"] = folder
        for seed in range(arguments.seeds):
            theirs = bits(SEED_RECIPE, arguments.steps, seed, arguments.text, f"theirs-{seed}")
            ours = bits({}, fewer, seed, arguments.text, f"ours-{seed}")
            for name, value in zip(found, (theirs, ours), strict=True):
                found[name].append(value)
    table(
        [
            {
                "recipe": name,
                "mean bpb": statistics.mean(values),
                "each": " ".join(f"{value:.3f}" for value in values),
            }
            for name, values in found.items()
        ]
    )
    theirs, ours = found.values()
    kept = all(b <= a for a, b in zip(theirs, ours, strict=True))
    print("reached in every seed" if kept else "NOT reached in every seed")
    text = Path(arguments.text).parent.name if arguments.text else "tasks"
    tokens = arguments.steps * BATCH["rows"] * BATCH["context"]
    print(write("learning", {"text": text, "tokens": tokens, "share": SHARE, "bpb": found}))


if __name__ == "__main__":
    main()

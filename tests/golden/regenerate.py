"""Writes the golden logits and losses: `python tests/golden/regenerate.py`.

The tests in this folder compare with these files. Changed numbers mean that models and training
runs of the same seed differ from earlier versions. Run the command only for an intended change,
read the difference, and write the reason in LOG.md.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml

from tinsmith.config import from_dict
from tinsmith.core.log import read_metrics
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.train.trainer import train

FILE = Path(__file__).with_name("logits.json")
LOSSES = Path(__file__).with_name("losses.json")
LOSSES_NOTE = (
    "The first 10 losses of every recipe of recipes/tiny that begins from nothing, on generated"
    " tasks, with small batches and float32 throughout, on a CPU; another CPU or torch may differ"
    " by rounding: compare to 1e-3."
)
RECIPES = [
    path
    for path in sorted(Path(__file__).parents[2].glob("recipes/tiny/*.yaml"))
    if not {"init_from:", "teacher:"} & set(path.read_text(encoding="utf-8").split())
]
"""Recipes that need no other run's model."""
SHORT = {
    "data": {"kind": "tasks", "count": 600},
    "eval": {"max_samples": 2, "max_new_tokens": 4},
    "log": {"every": 1},
}
NOTE = (
    "Float32 logits on a CPU at step 0, torch.manual_seed(0), of ids (7 * i + 3) mod 32; another"
    " CPU or torch may differ by rounding: compare to 1e-5."
)
SWIGLU = {"kind": "swiglu", "hidden_dim": 24}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {
        "pattern": [{"mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2}, "feed_forward": SWIGLU}]
    },
    "every option": {
        "tie_embeddings": False,
        "rope": {
            "theta": 1.0e4,
            "scaling": {"kind": "yarn", "factor": 4, "original_max_seq_len": 8},
        },
        "pattern": [
            {
                "mixer": {
                    "kind": "gqa",
                    "heads": 4,
                    "kv_heads": 2,
                    "head_dim": 6,
                    "qk_norm": True,
                    "window": 3,
                    "sinks": True,
                    "value_residual": True,
                    "bias": "all",
                },
                "feed_forward": {"kind": "relu2", "hidden_dim": 24, "bias": True},
            },
        ],
    },
    "experts": {
        "pattern": [
            {
                "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2},
                "feed_forward": {
                    **{"kind": "topk_moe", "experts": 4, "top_k": 2, "n_shared_experts": 1},
                    "hidden_dim": 24,
                },
            },
            {
                "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2},
                "feed_forward": {
                    **{"kind": "deepseek_moe", "experts": 8, "top_k": 3, "n_group": 4},
                    **{"topk_group": 2, "hidden_dim": 12},
                },
            },
        ]
    },
    "learned positions, layer norm": {
        "positions": "learned",
        "norm": "layer",
        "pattern": [{"mixer": {"kind": "gqa", "heads": 2}, "feed_forward": SWIGLU}],
    },
}


def logits() -> dict[str, list[list[float]]]:
    """Return logits by model: the last three positions of two rows, rounded to six decimals."""
    result = {}
    for name, options in MODELS.items():
        section = {"vocab_size": 32, "dim": 16, "depth": 2, "max_seq_len": 16} | options
        torch.manual_seed(0)
        lm = LM(ModelConfig.from_dict(section)).eval()
        ids = (7 * torch.arange(24).view(2, 12) + 3) % 32
        with torch.no_grad():
            last = lm(ids).logits[:, -3:].flatten(0, 1)
        result[name] = [[round(x, 6) for x in row] for row in last.tolist()]
    return result


def losses(recipe: Path) -> list[float]:
    """Return the first ten losses of a recipe on generated tasks, rounded to five decimals."""
    config = yaml.safe_load(recipe.read_text(encoding="utf-8")) | SHORT
    small = {"batch_size": 2, "seq_len": 256, "steps": 10, "precision": "fp32", "device": "cpu"}
    never = dict.fromkeys(("save_every", "eval_every", "sample_every"), 1000)
    config["train"] = config["train"] | small | never
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, {"TINSMITH_RUNS": folder}),
        patch("tinsmith.optim.muon._cpu_has_bfloat16", bool),
    ):
        run = train(from_dict(config), "golden")
        metrics = read_metrics(run / "metrics.jsonl")
    return [round(line["loss"], 5) for line in metrics if line["kind"] == "train"]


if __name__ == "__main__":
    table = {recipe.stem: losses(recipe) for recipe in RECIPES}
    LOSSES.write_text(json.dumps({"note": LOSSES_NOTE} | table, indent=2) + "\n", encoding="utf-8")
    rows = {
        name: "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in table) + "\n  ]"
        for name, table in logits().items()
    }
    body = ",\n".join(f"  {json.dumps(name)}: {text}" for name, text in rows.items())
    FILE.write_text(f'{{\n  "note": {json.dumps(NOTE)},\n{body}\n}}\n', encoding="utf-8")

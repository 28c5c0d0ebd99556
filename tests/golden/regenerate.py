"""Golden logits: `python tests/golden/regenerate.py` writes what test_logits compares with.

A change of these numbers is a change of the model for everybody with a checkpoint or a seed: run
the command on purpose, read the difference, and say in LOG.md why it had to be.
"""

import json
from pathlib import Path
from typing import Any

import torch

from tinsmith.nn.model import LM, ModelConfig

FILE = Path(__file__).with_name("logits.json")
NOTE = (
    "Float32 logits on a CPU at step 0, torch.manual_seed(0), of ids (7 * i + 3) mod 32; another"
    " CPU or torch may differ by rounding: compare to 1e-5."
)
SWIGLU = {"kind": "swiglu", "hidden": 24}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {
        "pattern": [{"mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2}, "feed_forward": SWIGLU}]
    },
    "every option": {
        "tie_embeddings": False,
        "rope": {
            "theta": 1.0e4,
            "scaling": {"kind": "yarn", "factor": 4, "original_context": 8},
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
                "feed_forward": {"kind": "relu2", "hidden": 24, "bias": True},
            },
        ],
    },
    "learned positions, layer norm": {
        "positions": "learned",
        "norm": "layer",
        "pattern": [{"mixer": {"kind": "gqa", "heads": 2}, "feed_forward": SWIGLU}],
    },
}


def logits() -> dict[str, list[list[float]]]:
    """The last three positions of two rows of each model, by name; six decimals."""
    found = {}
    for name, options in MODELS.items():
        section = {"vocab_size": 32, "dim": 16, "depth": 2, "max_context": 16} | options
        torch.manual_seed(0)
        lm = LM(ModelConfig.from_dict(section)).eval()
        ids = (7 * torch.arange(24).view(2, 12) + 3) % 32
        with torch.no_grad():
            last = lm(ids).logits[:, -3:].flatten(0, 1)
        found[name] = [[round(x, 6) for x in row] for row in last.tolist()]
    return found


if __name__ == "__main__":
    rows = {
        name: "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in table) + "\n  ]"
        for name, table in logits().items()
    }
    body = ",\n".join(f"  {json.dumps(name)}: {text}" for name, text in rows.items())
    FILE.write_text(f'{{\n  "note": {json.dumps(NOTE)},\n{body}\n}}\n', encoding="utf-8")

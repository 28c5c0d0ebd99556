"""What routed experts gain, and what they cost.

    python experiments/routers/run.py [--seeds 3] [--only "dyn_moe smk" dense] [--steps 400]

Every case of cases.py on the embedded corpus, with equal numbers of parameters that a token meets
and equal tokens, by default three seeds: bits per byte of held-back modules, what the experts did,
seconds of a step. Results go to results.json as they come, and a case that is there is not run
again, so an interrupted run goes on. At the end page.py draws README.md and its pictures. With
another number of steps, results and page go to a folder of their own.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import cases
import page

from tinsmith.config import from_dict
from tinsmith.core.log import read_metrics
from tinsmith.train.trainer import train

HERE = Path(__file__).parent
SIZES = {"vocab_size": 1024, "dim": 128, "depth": 4, "max_context": 256, "rope": {"theta": 1e4}}
ACTIVE = 900_000
CONTEXT, ROWS, STEPS = 256, 8, 400


def recipe(section: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
    """The run of one model and seed."""
    return {
        "model": section,
        "data": {"kind": "stdlib"},
        "objective": {"kind": "pretrain"},
        "optim": {"schedule": {"kind": "wsd", "warmup": 20, "decay": 0.4}},
        "train": {
            **{"context": CONTEXT, "rows": ROWS, "steps": steps, "seed": seed},
            **{"precision": "fp32", "keep": {"last": 1, "best": False}},
            **{"save_every": steps, "eval_every": steps, "sample_every": steps},
        },
        "eval": {"rows": 128, "new_tokens": 8},
        "log": {"every": min(20, steps)},
    }


def experts(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the experts did at the end of a run; empty without any."""
    routing = [line for line in lines if line["kind"] == "routing"]
    if not routing:
        return {}
    last = routing[-1]
    (special,) = (line for line in lines if line["kind"] == "specialisation")
    loads = [sorted(layer["load"], reverse=True) for layer in last["layers"].values()]
    use = [statistics.mean(each) for each in zip(*loads, strict=True)]
    even = statistics.mean(use)
    return {
        "active": last["active"],
        "dead": last["dead"],
        "experts": last["experts"],
        "entropy": last["entropy"],
        "use": [load / even if even else 0.0 for load in use],
        "share": special["layers"]["all"]["share"],
    }


def case(name: str, seed: int, steps: int) -> dict[str, Any]:
    """All that is measured of one model and seed."""
    section = cases.model(name, SIZES, ACTIVE)
    found = {"case": name, "seed": seed, "steps": steps}
    found |= {"met": cases.active(section), "parameters": cases.total(section)}
    run = train(from_dict(recipe(section, seed, steps)), f"{time.time_ns()}")
    lines = list(read_metrics(run / "metrics.jsonl"))
    speeds = [line["tokens_per_second"] for line in lines if line["kind"] == "train"]
    bits = [line["bpb"] for line in lines if line["kind"] == "eval"][-1]
    step = CONTEXT * ROWS / statistics.median(speeds)
    return found | {"bpb": bits, "step_s": step} | experts(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Routers of experts, compared.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", nargs="+", default=cases.CASES, choices=cases.CASES)
    asked = parser.parse_args()
    out = HERE if asked.steps == STEPS else HERE / f"steps-{asked.steps}"
    out.mkdir(exist_ok=True)
    results = out / "results.json"
    done = json.loads(results.read_text(encoding="utf-8")) if results.exists() else []
    known = {(row["case"], row["seed"]) for row in done}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TINSMITH_RUNS"] = folder
        for seed, name in product(range(asked.seeds), asked.only):
            if (name, seed) in known:
                continue
            done.append(case(str(name), int(seed), asked.steps))
            results.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(done[-1]), flush=True)
    page.write(done, out)


if __name__ == "__main__":
    main()

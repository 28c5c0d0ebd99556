"""What routed experts gain, and what they cost.

    python -m experiments.routers.run [--seeds 3] [--only "dyn_moe smk" dense] [--steps 400]

Every case of cases.py on the embedded corpus, with equal numbers of parameters that a token meets
and equal tokens, by default three seeds: bits per byte of held-back modules, what the experts did,
seconds of a step. Results go to results.json as they come, and a case that is there is not run
again, so an interrupted run goes on. At the end page.py draws README.md and its pictures. With
another number of steps, results and page go to a folder of their own.
"""

import statistics
import time
from typing import Any

from experiments.common import Results, bits, on_stdlib, parser, place, step_seconds, workplace
from experiments.routers import cases, page
from tinsmith.config import from_dict
from tinsmith.core.log import read_metrics
from tinsmith.train.trainer import train

SIZES = {"vocab_size": 1024, "dim": 128, "depth": 4, "max_seq_len": 256, "rope": {"theta": 1e4}}
ACTIVE = 900_000
STEPS = 400


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
    sections = {"model": section, "objective": {"kind": "pretrain"}}
    recipe = on_stdlib(sections, seed, steps, every=20)
    run = train(from_dict(recipe), f"{time.time_ns()}")
    lines = list(read_metrics(run / "metrics.jsonl"))
    return found | {"bpb": bits(lines), "step_s": step_seconds(lines)} | experts(lines)


def main() -> None:
    words = parser(__doc__, list(cases.CASES))
    words.add_argument("--steps", type=int, default=STEPS)
    requested = words.parse_args()
    out = place(__file__, requested.steps, STEPS)
    results = Results(out, "seed", "case")
    with workplace():
        for seed, name in results.missing(range(requested.seeds), requested.only):
            results.add(case(name, seed, requested.steps))
    page.write(results.rows, out)


if __name__ == "__main__":
    main()

"""Compares routers and experts at equal numbers of active parameters.

    python -m experiments.routers.run [--seeds 3] [--only "dyn_moe smk" dense] [--steps 400]

Every case of cases.py trains on the embedded corpus with equal numbers of active parameters and of
tokens, by default with three seeds. Measured are bits per byte of held-out modules, use of the
experts, and seconds of a step.

Results are written to results.json after each case, and cases in that file are not run again, so
an interrupted experiment can be continued. At the end page.py writes README.md and its pictures.
With another number of steps than the default, results and page go to the folder `steps-N`.
"""

import statistics
import time
from typing import Any

from experiments.common import (
    Results,
    last_bpb,
    parser,
    results_folder,
    stdlib_recipe,
    step_seconds,
    temporary_runs,
)
from experiments.routers import cases, page
from tinsmith.config import from_dict
from tinsmith.core.log import read_metrics
from tinsmith.train.trainer import train

SIZES = {"vocab_size": 1024, "dim": 128, "depth": 4, "max_seq_len": 256, "rope": {"theta": 1e4}}
ACTIVE = 900_000
STEPS = 400


def experts(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Return statistics of the experts at the end of a run; empty without experts."""
    routing = [record for record in metrics if record["kind"] == "routing"]
    if not routing:
        return {}
    last = routing[-1]
    (specialisation,) = (record for record in metrics if record["kind"] == "specialisation")
    loads = [sorted(layer["load"], reverse=True) for layer in last["layers"].values()]
    use = [statistics.mean(each) for each in zip(*loads, strict=True)]
    uniform = statistics.mean(use)
    return {
        "active": last["active"],
        "dead": last["dead"],
        "experts": last["experts"],
        "entropy": last["entropy"],
        "use": [load / uniform if uniform else 0.0 for load in use],
        "share": specialisation["layers"]["all"]["normalized_mi"],
    }


def measure(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Train a case with a seed and return its record."""
    section = cases.model(name, SIZES, ACTIVE)
    record = {"case": name, "seed": seed, "steps": steps}
    record |= {"met": cases.active(section), "parameters": cases.total(section)}
    sections = {"model": section, "objective": {"kind": "pretrain"}}
    recipe = stdlib_recipe(sections, seed, steps, every=20)
    run = train(from_dict(recipe), f"{time.time_ns()}")
    metrics = list(read_metrics(run / "metrics.jsonl"))
    return record | {"bpb": last_bpb(metrics), "step_s": step_seconds(metrics)} | experts(metrics)


def main() -> None:
    options = parser(__doc__, list(cases.CASES))
    options.add_argument("--steps", type=int, default=STEPS)
    arguments = options.parse_args()
    out = results_folder(__file__, arguments.steps, STEPS)
    results = Results(out, "seed", "case")
    with temporary_runs():
        for seed, name in results.missing(range(arguments.seeds), arguments.only):
            results.add(measure(name, seed, arguments.steps))
    page.write(results.records, out)


if __name__ == "__main__":
    main()

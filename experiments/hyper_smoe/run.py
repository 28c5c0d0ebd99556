"""What a sparse student on its teacher's frozen skeleton learns, and what it costs.

    python -m experiments.hyper_smoe.run [--seeds 3] [--only "dyn_moe smk" dense] [--steps 150]

For each seed a dense teacher of 1M parameters is trained on the embedded corpus; every student of
cases.py then learns for equal tokens of the same text, most of them from the teacher's soft labels;
one from nothing learns for as many more as its teacher had.
Measured: bits per byte of held-back modules, the divergence from the teacher in nats per token
(over the last tenth of the steps: the student sees no text twice), what the experts did, seconds
of a training step, and seconds of a forward pass beside the teacher's, in turns. Results go to
results.json as they come, and a case that is there is not run again, so an interrupted run goes on.
At the end page.py draws README.md and its picture. With another number of steps, results and page
go to a folder of their own.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from experiments.common import (
    CONTEXT,
    ROWS,
    Results,
    bits,
    on_stdlib,
    parser,
    place,
    step_seconds,
    workplace,
)
from experiments.hyper_smoe import cases, page
from tinsmith.config import from_dict
from tinsmith.core.log import Metrics, read_metrics
from tinsmith.hub.load import load
from tinsmith.nn.model import LM
from tinsmith.nn.parameters import count_parameters
from tinsmith.train.trainer import train

STEPS, TAUGHT = 150, 400
EVERY = 5
ROUNDS = 9


def schooling(steps: int) -> int:
    """Steps of a teacher; a trial of few steps has one of few steps."""
    return min(TAUGHT, 4 * steps)


def teach(seed: int, steps: int) -> Path:
    """The teacher of a seed."""
    name, length = f"teacher-{seed}", schooling(steps)
    sections = {"model": cases.TEACHER, "tokenizer": {"train": {"vocab_size": 1024}}}
    sections |= {"objective": {"kind": "pretrain"}}
    return train(from_dict(on_stdlib(sections, seed, length, EVERY)), name, resume=True)


def measured(name: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """All that is measured of one student."""
    case, teacher = cases.CASES[name], teach(seed, steps)
    length = steps + schooling(steps) if case.older else steps
    place = f"{time.time_ns()}"
    sections = cases.begin(case, teacher, folder / place, seed)
    sections |= {"objective": cases.objective(case, teacher)}
    # other text than the teacher's first steps had, and than other seeds'
    run = train(from_dict(on_stdlib(sections, seed + 1000, length, EVERY)), place)
    lines = list(read_metrics(run / "metrics.jsonl"))
    trained = [line for line in lines if line["kind"] == "train"]
    student, _ = load(run)
    known, _ = load(teacher)
    size = count_parameters(student)
    return {
        **{"case": name, "seed": seed, "steps": length},
        **{"trained": size.trainable, "frozen": size.frozen},
        **{"bpb": bits(lines), "teacher": bits(list(read_metrics(teacher / "metrics.jsonl")))},
        **{"step_s": step_seconds(lines), "forward": forward(student, known)},
        **{"curve": [[line["tokens"], line.get("divergence")] for line in trained]},
        **experts(lines, student),
    }


def experts(lines: list[Metrics], student: LM) -> dict[str, Any]:
    """What the experts did at the end, and the share of feed-forward parameters that acted."""
    routing = [line for line in lines if line["kind"] == "routing"]
    feeds = sum(p.numel() for block in student.blocks for p in block.feed.parameters())
    whole = cases.TEACHER["depth"] * 3 * cases.TEACHER["dim"] * cases.HIDDEN
    if not routing:
        return {"acting": feeds / whole}
    last, count = routing[-1], cases.EXPERTS
    return {
        "acting": last["active"] / count,
        "active": last["active"],
        "dead": last["dead"] / last["experts"],
    }


@torch.no_grad()
def forward(student: LM, teacher: LM) -> float:
    """Seconds of a forward pass over those of the teacher: medians, in turns."""
    ids = torch.randint(1024, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {"student": [], "teacher": []}
    for number in range(ROUNDS + 1):
        for name, lm in (("student", student), ("teacher", teacher)):
            start = time.perf_counter()
            lm(ids, logits=False)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return statistics.median(seconds["student"]) / statistics.median(seconds["teacher"])


def main() -> None:
    words = parser(__doc__, list(cases.CASES))
    words.add_argument("--steps", type=int, default=STEPS)
    requested = words.parse_args()
    out = place(__file__, requested.steps, STEPS)
    results = Results(out, "seed", "case")
    with workplace() as folder:
        for seed, name in results.missing(range(requested.seeds), requested.only):
            results.add(measured(name, seed, requested.steps, folder))
    page.write(results.rows, out)


if __name__ == "__main__":
    main()

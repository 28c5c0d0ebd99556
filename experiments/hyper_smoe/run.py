"""Compares sparse students on their teacher's frozen skeleton with dense ones and new models.

    python -m experiments.hyper_smoe.run [--seeds 3] [--only "dyn_moe smk" dense] [--steps 150]

For each seed a dense teacher of 1M parameters is trained on the embedded corpus. Every student of
cases.py then trains on equal numbers of tokens of the same text, most of them by distillation; one
student from nothing adds the teacher's number of steps. Measured are bits per byte of held-out
modules, the divergence from the teacher in nats per token over the last tenth of the steps (the
student sees no text twice), use of the experts, seconds of a training step, and seconds of a
forward pass relative to the teacher, in turns.

Results are written to results.json after each case, and cases in that file are not run again, so
an interrupted experiment can be continued. At the end page.py writes README.md and its picture.
With another number of steps than the default, results and page go to the folder `steps-N`.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from experiments.common import (
    BATCH_SIZE,
    SEQ_LEN,
    Results,
    last_bpb,
    parser,
    results_folder,
    stdlib_recipe,
    step_seconds,
    temporary_runs,
)
from experiments.hyper_smoe import cases, page
from tinsmith.config import from_dict
from tinsmith.core.log import Metrics, read_metrics
from tinsmith.hub.load import load
from tinsmith.nn.model import LM
from tinsmith.nn.parameters import count_parameters
from tinsmith.train.trainer import train

STEPS, TEACHER_STEPS = 150, 400
LOG_EVERY = 5
ROUNDS = 9


def teacher_steps(steps: int) -> int:
    """Return the steps of the teacher, fewer than the default for short students."""
    return min(TEACHER_STEPS, 4 * steps)


def train_teacher(seed: int, steps: int) -> Path:
    """Train the teacher of a seed, or find the finished run."""
    name, length = f"teacher-{seed}", teacher_steps(steps)
    sections = {"model": cases.TEACHER, "tokenizer": {"train": {"vocab_size": 1024}}}
    sections |= {"objective": {"kind": "pretrain"}}
    return train(from_dict(stdlib_recipe(sections, seed, length, LOG_EVERY)), name, resume=True)


def measure(name: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train a student and return its record."""
    case, teacher = cases.CASES[name], train_teacher(seed, steps)
    length = steps + teacher_steps(steps) if case.longer else steps
    run_name = f"{time.time_ns()}"
    sections = cases.initial_model(case, teacher, folder / run_name, seed)
    sections |= {"objective": cases.objective(case, teacher)}
    # another order of the text than in the teacher's first steps and in other seeds
    run = train(from_dict(stdlib_recipe(sections, seed + 1000, length, LOG_EVERY)), run_name)
    metrics = list(read_metrics(run / "metrics.jsonl"))
    train_records = [record for record in metrics if record["kind"] == "train"]
    student, _ = load(run)
    teacher_model, _ = load(teacher)
    size = count_parameters(student)
    return {
        **{"case": name, "seed": seed, "steps": length},
        **{"trained": size.trainable, "frozen": size.frozen},
        **{
            "bpb": last_bpb(metrics),
            "teacher": last_bpb(list(read_metrics(teacher / "metrics.jsonl"))),
        },
        **{"step_s": step_seconds(metrics), "forward": forward(student, teacher_model)},
        **{"curve": [[record["tokens"], record.get("divergence")] for record in train_records]},
        **experts(metrics, student),
    }


def experts(metrics: list[Metrics], student: LM) -> dict[str, Any]:
    """Return the use of experts at the end, and the share of active feed-forward parameters."""
    routing = [record for record in metrics if record["kind"] == "routing"]
    feed_params = sum(p.numel() for block in student.blocks for p in block.feed.parameters())
    teacher_params = cases.TEACHER["depth"] * 3 * cases.TEACHER["dim"] * cases.HIDDEN
    if not routing:
        return {"acting": feed_params / teacher_params}
    last, count = routing[-1], cases.EXPERTS
    return {
        "acting": last["active"] / count,
        "active": last["active"],
        "dead": last["dead"] / last["experts"],
    }


@torch.no_grad()
def forward(student: LM, teacher: LM) -> float:
    """Return the time of a forward pass relative to the teacher, from medians in turns."""
    ids = torch.randint(1024, (BATCH_SIZE, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {"student": [], "teacher": []}
    for turn in range(ROUNDS + 1):
        for name, lm in (("student", student), ("teacher", teacher)):
            start = time.perf_counter()
            lm(ids, logits=False)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return statistics.median(seconds["student"]) / statistics.median(seconds["teacher"])


def main() -> None:
    options = parser(__doc__, list(cases.CASES))
    options.add_argument("--steps", type=int, default=STEPS)
    arguments = options.parse_args()
    out = results_folder(__file__, arguments.steps, STEPS)
    results = Results(out, "seed", "case")
    with temporary_runs() as folder:
        for seed, name in results.missing(range(arguments.seeds), arguments.only):
            results.add(measure(name, seed, arguments.steps, folder))
    page.write(results.records, out)


if __name__ == "__main__":
    main()

"""What a sparse student on its teacher's frozen skeleton learns, and what it costs.

    python experiments/hyper_smoe/run.py [--seeds 3] [--only "dyn_moe smk" dense] [--steps 150]

For each seed a dense teacher of 1M parameters is trained on the embedded corpus; every student of
cases.py then learns for equal tokens of the same text, most of them from the teacher's soft labels.
Measured: bits per byte of held-back modules, the divergence from the teacher in nats per token
(over the last tenth of the steps: the student sees no text twice), what the experts did, seconds
of a training step, and seconds of a forward pass beside the teacher's, in turns. Results go to
results.json as they come, and a case that is there is not run again, so an interrupted run goes on.
At the end page.py draws README.md and its picture. With another number of steps, results and page
go to a folder of their own.
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
import torch

from tinsmith.config import from_dict
from tinsmith.core.log import Metrics, read_metrics
from tinsmith.hub.load import load
from tinsmith.nn.model import LM
from tinsmith.nn.parts.trained import counts
from tinsmith.train.trainer import train

HERE = Path(__file__).parent
CONTEXT, ROWS, STEPS, TAUGHT = 256, 8, 150, 400
EVERY = 5
ROUNDS = 9


def recipe(sections: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
    """A run on the embedded corpus."""
    return sections | {
        "data": {"kind": "stdlib"},
        "optim": {"schedule": {"kind": "wsd", "warmup": 20, "decay": 0.4}},
        "train": {
            **{"context": CONTEXT, "rows": ROWS, "steps": steps, "seed": seed},
            **{"precision": "fp32", "keep": {"last": 1, "best": False}},
            **{"save_every": steps, "eval_every": steps, "sample_every": steps},
        },
        "eval": {"rows": 128, "new_tokens": 8},
        "log": {"every": min(EVERY, steps)},
    }


def teach(seed: int, steps: int) -> Path:
    """The teacher of a seed; a trial of few steps has one of few steps."""
    name, length = f"teacher-{seed}", min(TAUGHT, 4 * steps)
    sections = {"model": cases.TEACHER, "tokenizer": {"train": {"vocab_size": 1024}}}
    sections |= {"objective": {"kind": "pretrain"}}
    return train(from_dict(recipe(sections, seed, length)), name, resume=True)


def measured(name: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """All that is measured of one student."""
    case, teacher = cases.CASES[name], teach(seed, steps)
    place = f"{time.time_ns()}"
    sections = cases.begin(case, teacher, folder / place, seed)
    sections |= {"objective": cases.objective(case, teacher)}
    # other text than the teacher's first steps had, and than other seeds'
    run = train(from_dict(recipe(sections, seed + 1000, steps)), place)
    lines = list(read_metrics(run / "metrics.jsonl"))
    trained = [line for line in lines if line["kind"] == "train"]
    student, _ = load(run)
    known, _ = load(teacher)
    speed = statistics.median(line["tokens_per_second"] for line in trained)
    size = counts(student)
    return {
        **{"case": name, "seed": seed, "steps": steps},
        **{"trained": size.trained, "frozen": size.frozen},
        **{"bpb": bits(lines), "teacher": bits(list(read_metrics(teacher / "metrics.jsonl")))},
        **{"step_s": CONTEXT * ROWS / speed, "forward": forward(student, known)},
        **{"curve": [[line["tokens"], line.get("divergence")] for line in trained]},
        **experts(lines, student),
    }


def bits(lines: list[Metrics]) -> float:
    """Of the last evaluation."""
    return [line["bpb"] for line in lines if line["kind"] == "eval"][-1]


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
    parser = argparse.ArgumentParser(description="Hyper-SMoE students, compared.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", nargs="+", default=list(cases.CASES), choices=cases.CASES)
    asked = parser.parse_args()
    out = HERE if asked.steps == STEPS else HERE / f"steps-{asked.steps}"
    out.mkdir(exist_ok=True)
    results = out / "results.json"
    done = json.loads(results.read_text(encoding="utf-8")) if results.exists() else []
    known = {(row["case"], row["seed"]) for row in done}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TINSMITH_RUNS"] = str(Path(folder) / "runs")
        for seed, name in product(range(asked.seeds), asked.only):
            if (name, seed) in known:
                continue
            done.append(measured(str(name), int(seed), asked.steps, Path(folder)))
            results.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
            shown = {key: value for key, value in done[-1].items() if key != "curve"}
            print(json.dumps(shown), flush=True)
    page.write(done, out)


if __name__ == "__main__":
    main()

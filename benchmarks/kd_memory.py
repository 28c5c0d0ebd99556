"""Measures the temporary memory of a distillation loss over a large vocabulary.

    python benchmarks/kd_memory.py

A vocabulary of 151,936, 8,192 positions, width 1,024: forward and backward of the chunked loss,
each loss in a separate process. Not counted are the heads of student and teacher, the hidden states
of both, and the student's gradients. The goal is at most 1 GiB in addition. Full logits of both
models, their distributions and one gradient would take 23 GiB.
"""

import json
import resource
import subprocess
import sys
import threading
import time
from typing import Any

import torch
from common import table, write

from tinsmith.losses.divergence import DistillWeights, HeadInputs, summed_divergence

VOCABULARY, POSITIONS, WIDTH = 151_936, 8_192, 1_024
GOAL = 2**30
CASES = {
    "forward": DistillWeights(beta=0.0, temperature=2.0, scale=4.0),
    "forward, half labels": DistillWeights(beta=0.0, temperature=2.0, scale=4.0, ce_weight=0.5),
    "jsd": DistillWeights(beta=0.5, temperature=1.0),
}


def measure(case: str) -> dict[str, Any]:
    """Return the temporary memory of a loss in bytes, and its seconds."""
    hidden = torch.randn(POSITIONS, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH).mul_(0.02).requires_grad_()
    teacher = HeadInputs(torch.randn(POSITIONS, WIDTH), torch.randn(VOCABULARY, WIDTH).mul_(0.02))
    targets, weights = torch.randint(0, VOCABULARY, (POSITIONS,)), torch.ones(POSITIONS)
    before = _resident()
    gradients = 4 * (hidden.numel() + weight.numel())
    peak = _Peak()
    start = time.perf_counter()
    total, _ = summed_divergence(HeadInputs(hidden, weight), teacher, targets, weights, CASES[case])
    (total / POSITIONS).backward()
    seconds = time.perf_counter() - start
    return {"extra": peak.stop() - before - gradients, "seconds": seconds}


class _Peak:
    """Measures the peak resident memory from now on, by polling every few milliseconds."""

    def __init__(self) -> None:
        self._largest, self._stopped = _resident(), threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.005):
            self._largest = max(self._largest, _resident())

    def stop(self) -> int:
        """Stop polling and return the peak in bytes."""
        self._stopped.set()
        self._watcher.join()
        return self._largest


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    """Measure every case in a new process, print a table and write the JSON file."""
    rows, results = [], {}
    for case in CASES:
        command = [sys.executable, __file__, case]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results[case] = json.loads(done.stdout)
        extra = results[case]["extra"]
        verdict = "ok" if extra <= GOAL else "too much"
        gib = extra / 2**30
        rows.append(
            {"loss": case, "GiB extra": gib, "s": results[case]["seconds"], "1 GiB": verdict}
        )
    table(rows)
    sizes = {"vocabulary": VOCABULARY, "positions": POSITIONS, "width": WIDTH}
    print(write("kd_memory", {"sizes": sizes, "cases": results}))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()

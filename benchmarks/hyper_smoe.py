"""One real training step of Hyper-SMoE at its published sizes: how long, and how much memory.

    python benchmarks/hyper_smoe.py [--tokens 512] [--depth 28] [--teacher nf4]

Random weights of Qwen3-0.6B's shape are the teacher; their transplant, 596,968,320 parameters of
which 265,159,552 train, is the student: 32 experts of width 96 in each of 28 layers, whose router
learns from surprise. Forward of both, the loss in chunks over 151,936 ids, backward with activation
checkpointing, the optimizer's step; in a process of its own. Peak: resident memory on a CPU, what
torch allocated on a GPU; `built` is the peak before the first step, while teacher and student are
made side by side in float32. What is learned means nothing: the point is what a step takes. A long
row of few layers (`--tokens 32768 --depth 2`) tells what each further layer adds.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from common import table, write

from tinsmith.data.loader.batch import Batch
from tinsmith.hub.transplant import TransplantPlan, build_transplant
from tinsmith.nn.config import Layer, ModelConfig
from tinsmith.nn.feedforwards.dense import SwiGLU
from tinsmith.nn.model import LM
from tinsmith.nn.parameters import ALL_PARAMETERS, count_parameters
from tinsmith.nn.quant import nbytes, quantize
from tinsmith.objectives.kd import KD
from tinsmith.optim.build import Optimizers
from tinsmith.optim.config import AdafactorConfig, AdamW8bitConfig, AdamWConfig, OptimConfig
from tinsmith.train.precision import autocast

MATRICES = {
    "adamw8bit": AdamW8bitConfig(lr=4e-4),
    "adafactor": AdafactorConfig(),
    "adamw": AdamWConfig(lr=4e-4),
}
HIDDEN = 3072


def dense(depth: int) -> ModelConfig:
    """Qwen3-0.6B, or the first of its layers."""
    sparse = ModelConfig.preset("tiny-onn-0.6b")
    layer = Layer(mixer=sparse.layers[0].mixer, feed_forward=SwiGLU(hidden_dim=HIDDEN))
    return replace(sparse, pattern=(layer,), depth=depth, trainable=ALL_PARAMETERS)


def batch(tokens: int, vocabulary: int, device: str) -> Batch:
    """A row of random ids."""
    ids = torch.randint(vocabulary, (1, tokens + 1))
    positions = torch.arange(tokens)[None]
    everything, nowhere = torch.ones(1, tokens, dtype=torch.bool), torch.zeros_like(positions)
    made = Batch(ids[:, :-1], ids[:, 1:], everything, positions, nowhere, torch.zeros(1).long())
    return made.to(torch.device(device))


def measure(requested: argparse.Namespace) -> dict[str, Any]:
    """The steps, in this process."""
    torch.manual_seed(0)
    teacher = LM(dense(requested.depth)).eval()
    student = (
        build_transplant(teacher, TransplantPlan({"router_grad": requested.router}))
        .to(requested.device)
        .train()
    )
    teacher = quantize(teacher.to(requested.device), requested.teacher)
    student.activation_checkpointing = True
    objective = KD(teacher="random", reads="documents").build()
    objective.frozen_models = {"teacher": teacher}
    optimizers = Optimizers.build(student, None, OptimConfig(matrices=MATRICES[requested.matrices]))
    built = _peak(requested.device, reset=True)
    rows = batch(requested.tokens, student.config.vocab_size, requested.device)
    seconds, losses = [], []
    for _ in range(requested.steps):
        start = time.perf_counter()
        with autocast(requested.precision, torch.device(requested.device)):
            output = objective.loss(student, rows)
        (output.total / requested.tokens).backward()
        student.after_backward(output.grad_probes)
        optimizers.step()
        optimizers.zero_grad()
        losses.append(float(output.metrics["loss"].total) / requested.tokens)
        seconds.append(time.perf_counter() - start)
    assert all(map(math.isfinite, losses)), losses
    state = optimizers.state_tensors().values()
    return {
        **{"loss": losses, "seconds": seconds, "counts": count_parameters(student)._asdict()},
        **{"built": built, "peak": _peak(requested.device), "teacher": nbytes(teacher)},
        **{"student": nbytes(student), "moments": sum(t.nbytes for t in state)},
    }


def _peak(device: str, reset: bool = False) -> int:
    """The most bytes so far, or, on a GPU, since it was last reset."""
    if device != "cpu":
        most = torch.cuda.max_memory_allocated()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return most
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="One step of Hyper-SMoE at 0.6B.")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--depth", type=int, default=28, help="layers")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--teacher", default="nf4", choices=["nf4", "int8", "bf16", "fp32"])
    parser.add_argument("--matrices", default="adamw8bit", choices=MATRICES)
    parser.add_argument("--router", default="smk", choices=["task", "smk", "sml", "both"])
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--alone", action="store_true", help="measure in this process, print JSON")
    requested = parser.parse_args()
    if requested.alone:
        print(json.dumps(measure(requested)))
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--alone"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    sizes = ("student", "teacher", "moments", "built", "peak")
    table([{"what": name, "GiB": found[name] / 2**30} for name in sizes])
    print(f"loss {found['loss'][-1]:.3f}, {found['seconds'][-1]:.1f} s a step")
    print(
        write(
            f"hyper_smoe_{requested.depth}x{requested.tokens}",
            {"asked": vars(requested), "found": found},
        )
    )


if __name__ == "__main__":
    main()

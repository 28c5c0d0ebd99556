"""Measures time and memory of one training step of Hyper-SMoE at its published sizes.

    python benchmarks/hyper_smoe.py [--tokens 512] [--depth 28] [--teacher nf4]

The teacher has the shape of Qwen3-0.6B and random weights. Its transplant, 596,968,320 parameters
of which 265,159,552 train, is the student: 32 experts of width 96 in each of 28 layers, with a
router trained on surprise. The step is forward of both, the chunked loss over 151,936 ids, backward
with activation checkpointing, and the optimizer, in a separate process. The peak is resident memory
on a CPU and torch's allocated memory on a GPU; `built` is the peak before the first step, when
teacher and student are built in float32. The loss has no meaning. A long row of few layers
(`--tokens 32768 --depth 2`) shows the cost of each further layer.
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
    """Return the config of Qwen3-0.6B with its first `depth` layers."""
    sparse = ModelConfig.preset("tiny-onn-0.6b")
    layer = Layer(mixer=sparse.layers[0].mixer, feed_forward=SwiGLU(hidden_dim=HIDDEN))
    return replace(sparse, pattern=(layer,), depth=depth, trainable=ALL_PARAMETERS)


def batch(tokens: int, vocabulary: int, device: str) -> Batch:
    """Return a batch of one row of random ids."""
    ids = torch.randint(vocabulary, (1, tokens + 1))
    positions = torch.arange(tokens)[None]
    loss_mask, segments = torch.ones(1, tokens, dtype=torch.bool), torch.zeros_like(positions)
    result = Batch(ids[:, :-1], ids[:, 1:], loss_mask, positions, segments, torch.zeros(1).long())
    return result.to(torch.device(device))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the steps in this process and return losses, times and sizes."""
    torch.manual_seed(0)
    teacher = LM(dense(arguments.depth)).eval()
    student = (
        build_transplant(teacher, TransplantPlan({"router_grad": arguments.router}))
        .to(arguments.device)
        .train()
    )
    teacher = quantize(teacher.to(arguments.device), arguments.teacher)
    student.activation_checkpointing = True
    objective = KD(teacher="random", reads="documents").build()
    objective.frozen_models = {"teacher": teacher}
    optimizers = Optimizers.build(student, None, OptimConfig(matrices=MATRICES[arguments.matrices]))
    built = _peak(arguments.device, reset=True)
    rows = batch(arguments.tokens, student.config.vocab_size, arguments.device)
    seconds, losses = [], []
    for _ in range(arguments.steps):
        start = time.perf_counter()
        with autocast(arguments.precision, torch.device(arguments.device)):
            output = objective.loss(student, rows)
        (output.total / arguments.tokens).backward()
        student.after_backward(output.grad_probes)
        optimizers.step()
        optimizers.zero_grad()
        losses.append(float(output.metrics["loss"].total) / arguments.tokens)
        seconds.append(time.perf_counter() - start)
    assert all(map(math.isfinite, losses)), losses
    state = optimizers.state_tensors().values()
    return {
        **{"loss": losses, "seconds": seconds, "counts": count_parameters(student)._asdict()},
        **{"built": built, "peak": _peak(arguments.device), "teacher": nbytes(teacher)},
        **{"student": nbytes(student), "moments": sum(t.nbytes for t in state)},
    }


def _peak(device: str, reset: bool = False) -> int:
    """Return the peak bytes of this process, or, on a GPU, since the last reset."""
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return peak
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
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(measure(arguments)))
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--alone"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout)
    sizes = ("student", "teacher", "moments", "built", "peak")
    table([{"what": name, "GiB": result[name] / 2**30} for name in sizes])
    print(f"loss {result['loss'][-1]:.3f}, {result['seconds'][-1]:.1f} s a step")
    print(
        write(
            f"hyper_smoe_{arguments.depth}x{arguments.tokens}",
            {"arguments": vars(arguments), "result": result},
        )
    )


if __name__ == "__main__":
    main()

"""Measures the cost of several residual streams in a training step of the 25.8M preset.

    python benchmarks/streams.py [--rounds 5] [--rows 8] [--no-compile]

Batches have `--rows` x 512 random tokens, bf16 autocast and the same AdamW; plain, hyper and mhyper
with four streams take turns. The bound is on compiled mhyper: at most 50 % more time than plain on
a CPU, 20 % on a GPU.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from common import interleave, medians, table, write

from tinsmith import LM, ModelConfig
from tinsmith.losses.logprobs import summed_nll
from tinsmith.nn.residuals.hyper import Hyper
from tinsmith.nn.residuals.mhyper import MHyper
from tinsmith.nn.residuals.plain import Plain

SEQ_LEN = 512
RESIDUALS: dict[str, Any] = {"plain": Plain(), "hyper": Hyper(), "mhyper": MHyper()}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUND = {"cpu": 0.5, "cuda": 0.2}


def step_of(residual: Any, rows: int, compiled: bool) -> Callable[[], None]:
    """Return forward, backward and AdamW on one batch."""
    torch.manual_seed(0)
    config = replace(ModelConfig.preset("minimind2-26m"), residual=residual)
    lm = LM(config).to(DEVICE).train()
    if compiled:
        lm.compile()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(config.vocab_size, (rows, SEQ_LEN + 1), device=DEVICE)
    loss_mask = torch.ones(rows, SEQ_LEN, dtype=torch.bool, device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out = lm(ids[:, :-1], logits=False)
            total = summed_nll(out.hidden, ids[:, 1:], loss_mask, lm.head)
        (total / loss_mask.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of several residual streams.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    modes = {"": False} if arguments.no_compile else {"": False, ", compiled": True}
    contestants = {
        name + suffix: step_of(residual, arguments.rows, compiled)
        for suffix, compiled in modes.items()
        for name, residual in RESIDUALS.items()
    }
    seconds = interleave(contestants, arguments.rounds, warmup=2)
    median_seconds = medians(seconds)
    more = {
        name: median_seconds[name] / median_seconds[f"plain{name.removeprefix(name.split(',')[0])}"]
        - 1
        for name in median_seconds
    }
    rows = [
        {
            "25.8M, 512 tokens": name,
            "s": median_seconds[name],
            "more than plain": f"{more[name]:.0%}",
        }
        for name in median_seconds
    ]
    table(rows)
    print(
        write("streams", {"rows": arguments.rows, "seconds": seconds, "more": more, "bound": BOUND})
    )


if __name__ == "__main__":
    main()

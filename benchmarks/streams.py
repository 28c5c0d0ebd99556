"""What several residual streams add to a training step of the 25.8M preset.

    python benchmarks/streams.py [--rounds 5] [--rows 8] [--no-compile]

rows x 512 random tokens, bf16 autocast, the same AdamW; plain, hyper and mhyper with four streams
take turns. The bound is on mhyper, compiled: at most 50 % more than plain on a CPU, 20 % on a GPU.
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

CONTEXT = 512
RESIDUALS: dict[str, Any] = {"plain": Plain(), "hyper": Hyper(), "mhyper": MHyper()}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUND = {"cpu": 0.5, "cuda": 0.2}


def step_of(residual: Any, rows: int, compiled: bool) -> Callable[[], None]:
    """Forward, backward and AdamW on one batch."""
    torch.manual_seed(0)
    config = replace(ModelConfig.preset("minimind2-26m"), residual=residual)
    lm = LM(config).to(DEVICE).train()
    if compiled:
        lm.compile()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(config.vocab_size, (rows, CONTEXT + 1), device=DEVICE)
    everything = torch.ones(rows, CONTEXT, dtype=torch.bool, device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out = lm(ids[:, :-1], logits=False)
            total = summed_nll(out.hidden, ids[:, 1:], everything, lm.head)
        (total / everything.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description="What several residual streams cost.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--no-compile", action="store_true")
    requested = parser.parse_args()
    ways = {"": False} if requested.no_compile else {"": False, ", compiled": True}
    contestants = {
        name + how: step_of(residual, requested.rows, compiled)
        for how, compiled in ways.items()
        for name, residual in RESIDUALS.items()
    }
    seconds = interleave(contestants, requested.rounds, warmup=2)
    middle = medians(seconds)
    more = {
        name: middle[name] / middle[f"plain{name.removeprefix(name.split(',')[0])}"] - 1
        for name in middle
    }
    rows = [
        {"25.8M, 512 tokens": name, "s": middle[name], "more than plain": f"{more[name]:.0%}"}
        for name in middle
    ]
    table(rows)
    print(
        write("streams", {"rows": requested.rows, "seconds": seconds, "more": more, "bound": BOUND})
    )


if __name__ == "__main__":
    main()

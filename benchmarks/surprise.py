"""What a router that learns from surprise adds to a training step.

    python benchmarks/surprise.py [--rounds 20] [--rows 4] [--depth 4] [--cpu-time]

dyn_moe, 32 experts of width 96 at width 512: `router_grad: smk` and `both` beside `task`, taking
turns; medians of their ratios, and quartiles. The bound is 5 %. `both` is all that `task` does and
surprise; `smk` saves the gradient of the gate. Gates keep still: otherwise each way soon has
another number of experts per token, which costs more than anything compared here.
`--cpu-time` counts this process's seconds only, for a machine that is busy with other things.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from operator import truediv

import torch
from common import medians, table, write

from tinsmith import LM, ModelConfig
from tinsmith.losses.logprobs import summed_nll
from tinsmith.objectives.base import add_aux_losses

CONTEXT, VOCAB = 256, 1024
BOUND = 0.05
WAYS = ("task", "smk", "both")


def step_of(way: str, rows: int, depth: int) -> Callable[[], None]:
    """Forward, backward, what the router learns, and AdamW, on one batch of random tokens."""
    torch.manual_seed(0)
    feed = {"kind": "dyn_moe", "experts": 32, "hidden_dim": 96, "router_grad": way}
    layer = {"mixer": {"kind": "gqa", "heads": 8, "kv_heads": 2}, "feed_forward": feed}
    section = {"vocab_size": VOCAB, "dim": 512, "depth": depth, "pattern": [layer]}
    lm = LM(ModelConfig.from_dict(section)).train()
    moving = [parameter for name, parameter in lm.named_parameters() if ".gate." not in name]
    optimizer = torch.optim.AdamW(moving, lr=1e-4, fused=True)
    ids = torch.randint(VOCAB, (rows, CONTEXT + 1))
    everything = torch.ones(rows, CONTEXT, dtype=torch.bool)

    def step() -> None:
        out = lm(ids[:, :-1], logits=False)
        total = summed_nll(out.hidden, ids[:, 1:], everything, lm.head)
        count = everything.sum()
        (add_aux_losses(total, out.losses, count) / count).backward()
        lm.after_backward(out.grad_probes)
        optimizer.step()
        lm.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description="What surprise costs.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--cpu-time", action="store_true")
    requested = parser.parse_args()
    clock = time.process_time if requested.cpu_time else time.perf_counter
    steps = {way: step_of(way, requested.rows, requested.depth) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(-1, requested.rounds):
        first = number % len(WAYS)
        for way in WAYS[first:] + WAYS[:first]:
            start = clock()
            steps[way]()
            if number >= 0:
                seconds[way].append(clock() - start)
    quartiles = {
        way: statistics.quantiles(map(truediv, seconds[way], seconds["task"]), n=4) for way in WAYS
    }
    rows = [
        {"router_grad": way, "s": middle, "over task": quartiles[way][1]}
        | {"quartile": quartiles[way][0], "other": quartiles[way][2]}
        for way, middle in medians(seconds).items()
    ]
    table(rows)
    facts = {"rows": requested.rows, "depth": requested.depth, "cpu_time": requested.cpu_time}
    output = {"seconds": seconds, "over_task": quartiles, "bound": 1 + BOUND}
    print(write("surprise", facts | output))


if __name__ == "__main__":
    main()

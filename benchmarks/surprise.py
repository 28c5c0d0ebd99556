"""Measures the cost of a router trained on surprise in a training step.

    python benchmarks/surprise.py [--rounds 20] [--rows 4] [--depth 4] [--cpu-time]

dyn_moe, 32 experts of width 96 at width 512: `router_grad: smk` and `both` relative to `task`, in
turns; medians and quartiles of the ratios. The bound is 5 %. `both` computes everything of `task`
and surprise; `smk` saves the task gradient of the router. Routers are not trained, because
otherwise the numbers of experts per token would differ, which costs more than the compared parts.
`--cpu-time` counts the CPU seconds of this process, for a machine with other load.
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

SEQ_LEN, VOCAB_SIZE = 256, 1024
BOUND = 0.05
ROUTER_GRADS = ("task", "smk", "both")


def step_of(router_grad: str, rows: int, depth: int) -> Callable[[], None]:
    """Return forward, backward, router gradients and AdamW on one batch of random tokens."""
    torch.manual_seed(0)
    feed = {"kind": "dyn_moe", "experts": 32, "hidden_dim": 96, "router_grad": router_grad}
    layer = {"mixer": {"kind": "gqa", "heads": 8, "kv_heads": 2}, "feed_forward": feed}
    section = {"vocab_size": VOCAB_SIZE, "dim": 512, "depth": depth, "pattern": [layer]}
    lm = LM(ModelConfig.from_dict(section)).train()
    trained = [parameter for name, parameter in lm.named_parameters() if ".gate." not in name]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(VOCAB_SIZE, (rows, SEQ_LEN + 1))
    loss_mask = torch.ones(rows, SEQ_LEN, dtype=torch.bool)

    def step() -> None:
        out = lm(ids[:, :-1], logits=False)
        total = summed_nll(out.hidden, ids[:, 1:], loss_mask, lm.head)
        count = loss_mask.sum()
        (add_aux_losses(total, out.losses, count) / count).backward()
        lm.after_backward(out.grad_probes)
        optimizer.step()
        lm.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of routers trained on surprise.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    steps = {name: step_of(name, arguments.rows, arguments.depth) for name in ROUTER_GRADS}
    seconds: dict[str, list[float]] = {name: [] for name in ROUTER_GRADS}
    for index in range(-1, arguments.rounds):
        first = index % len(ROUTER_GRADS)
        for name in ROUTER_GRADS[first:] + ROUTER_GRADS[:first]:
            start = clock()
            steps[name]()
            if index >= 0:
                seconds[name].append(clock() - start)
    quartiles = {
        name: statistics.quantiles(map(truediv, seconds[name], seconds["task"]), n=4)
        for name in ROUTER_GRADS
    }
    rows = [
        {"router_grad": name, "s": median_seconds, "over task": quartiles[name][1]}
        | {"quartile": quartiles[name][0], "other": quartiles[name][2]}
        for name, median_seconds in medians(seconds).items()
    ]
    table(rows)
    facts = {"rows": arguments.rows, "depth": arguments.depth, "cpu_time": arguments.cpu_time}
    output = {"seconds": seconds, "over_task": quartiles, "bound": 1 + BOUND}
    print(write("surprise", facts | output))


if __name__ == "__main__":
    main()

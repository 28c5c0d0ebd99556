"""What Muon costs: its share of a training step of 32k tokens of the 25.8M preset.

    python benchmarks/muon.py [--rounds 5]

The step is forward and backward of 8 micro-batches of 8 x 512 tokens under bf16 autocast, then Muon
on the block matrices and AdamW on the rest. Beside it, with the same matrices and gradients: Muon
with float32 products, one matrix at a time, torch's own, and AdamW. The bound is 10 %.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import interleave, medians, table, write

from tinsmith import LM, ModelConfig
from tinsmith.optim import muon
from tinsmith.optim.build import Optimizers
from tinsmith.optim.config import OptimConfig
from tinsmith.optim.groups import partition
from tinsmith.optim.muon import Muon

ROWS, CONTEXT, ACCUMULATE = 8, 512, 8
BOUND = 0.1


def tokens_of_a_step(lm: LM) -> Callable[[], None]:
    """Forward and backward of 32,768 random tokens; gradients are left in place."""
    vocabulary = lm.config.vocab_size
    shape = (ACCUMULATE, ROWS, CONTEXT + 1)
    batches = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))

    def work() -> None:
        lm.zero_grad()
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                logits = lm.head(lm(batch[:, :-1], logits=False).hidden)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            (loss / ACCUMULATE).backward()

    return work


def one_at_a_time(optimizer: Muon) -> Callable[[], None]:
    """The same step without batching."""

    def work() -> None:
        together, muon.BATCH_ELEMENTS = muon.BATCH_ELEMENTS, 1
        optimizer.step()
        muon.BATCH_ELEMENTS = together

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description="What Muon costs.")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    lm = LM(ModelConfig.preset("minimind2-26m"))
    matrices = [parameter for _, parameter in partition(lm)["matrix"]]
    ours, rest = Optimizers.build(lm, None, OptimConfig()).optimizers
    tokens = tokens_of_a_step(lm)
    contestants = {
        "forward and backward": tokens,
        "Muon": ours.step,
        "AdamW on the rest": rest.step,
        "Muon, float32 products": Muon(matrices, ns_dtype=torch.float32).step,
        "Muon, one at a time": one_at_a_time(Muon(matrices)),
        "torch.optim.Muon": torch.optim.Muon(matrices).step,
        "AdamW on the matrices": torch.optim.AdamW(matrices, fused=True).step,
    }
    tokens()
    seconds = interleave(contestants, rounds)
    middle = medians(seconds)
    rest_of_step = middle["forward and backward"] + middle["AdamW on the rest"]
    share = {name: time / (rest_of_step + time) for name, time in middle.items() if "Muon" in name}
    rows = [
        {"32k tokens, 25.8M": name, "ms": 1000 * time, "% of its step": _percent(share.get(name))}
        for name, time in middle.items()
    ]
    table(rows)
    kept = share["Muon"] <= BOUND
    verdict = "kept" if kept else "NOT kept"
    print(f"Muon's share {share['Muon']:.1%}, bound {BOUND:.0%}: {verdict}")
    data = {"tokens": ROWS * CONTEXT * ACCUMULATE, "preset": "minimind2-26m", "bound": BOUND}
    path = write("muon", data | {"kept": kept, "share": share, "seconds": seconds})
    print(path)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


if __name__ == "__main__":
    main()

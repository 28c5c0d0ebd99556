"""Measures Muon's share of a training step of 32k tokens of the 25.8M preset.

    python benchmarks/muon.py [--rounds 5]

The step is forward and backward of 8 micro-batches of 8 x 512 tokens under bf16 autocast, then Muon
on the block matrices and AdamW on the rest. For comparison, on the same matrices and gradients:
Muon with float32 products, Muon with one matrix at a time, torch.optim.Muon, and AdamW. The bound
is 10 %.
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

BATCH_SIZE, SEQ_LEN, GRAD_ACCUM_STEPS = 8, 512, 8
BOUND = 0.1


def forward_backward(lm: LM) -> Callable[[], None]:
    """Return forward and backward of 32,768 random tokens, which leaves gradients in place."""
    vocabulary = lm.config.vocab_size
    shape = (GRAD_ACCUM_STEPS, BATCH_SIZE, SEQ_LEN + 1)
    batches = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))

    def run() -> None:
        lm.zero_grad()
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                logits = lm.head(lm(batch[:, :-1], logits=False).hidden)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            (loss / GRAD_ACCUM_STEPS).backward()

    return run


def one_at_a_time(optimizer: Muon) -> Callable[[], None]:
    """Return the optimizer step without batching of matrices."""

    def step() -> None:
        batch_elements, muon.BATCH_ELEMENTS = muon.BATCH_ELEMENTS, 1
        optimizer.step()
        muon.BATCH_ELEMENTS = batch_elements

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description="Muon's share of a training step.")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    lm = LM(ModelConfig.preset("minimind2-26m"))
    matrices = [parameter for _, parameter in partition(lm)["matrix"]]
    muon_optimizer, adamw = Optimizers.build(lm, None, OptimConfig()).optimizers
    gradients = forward_backward(lm)
    contestants = {
        "forward and backward": gradients,
        "Muon": muon_optimizer.step,
        "AdamW on the rest": adamw.step,
        "Muon, float32 products": Muon(matrices, ns_dtype=torch.float32).step,
        "Muon, one at a time": one_at_a_time(Muon(matrices)),
        "torch.optim.Muon": torch.optim.Muon(matrices).step,
        "AdamW on the matrices": torch.optim.AdamW(matrices, fused=True).step,
    }
    gradients()
    seconds = interleave(contestants, rounds)
    middle = medians(seconds)
    rest_of_step = middle["forward and backward"] + middle["AdamW on the rest"]
    share = {
        name: value / (rest_of_step + value) for name, value in middle.items() if "Muon" in name
    }
    rows = [
        {"32k tokens, 25.8M": name, "ms": 1000 * value, "% of its step": _percent(share.get(name))}
        for name, value in middle.items()
    ]
    table(rows)
    kept = share["Muon"] <= BOUND
    verdict = "kept" if kept else "NOT kept"
    print(f"Muon's share {share['Muon']:.1%}, bound {BOUND:.0%}: {verdict}")
    data = {
        "tokens": BATCH_SIZE * SEQ_LEN * GRAD_ACCUM_STEPS,
        "preset": "minimind2-26m",
        "bound": BOUND,
    }
    path = write("muon", data | {"kept": kept, "share": share, "seconds": seconds})
    print(path)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


if __name__ == "__main__":
    main()

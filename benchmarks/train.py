"""A training step's speed and memory beside transformers' Llama, the same AdamW on both sides.

    python benchmarks/train.py [--rounds 7] [--rows 8] [--no-compile]

The 25.8M preset, rows x 512 random tokens, bf16 autocast, the same weights. Bounds: eager at least
1.1 times theirs; compiled at least 1.1 times their compiled and 1.35 times their eager form; peak
memory not above theirs (measured in processes of their own, eager).
"""

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable

import torch
from common import interleave, medians, table, write
from torch import nn

from tinsmith import LM, ModelConfig
from tinsmith.losses.logprobs import summed_nll

CONTEXT = 512
OURS, THEIRS = "tinsmith", "transformers"


def ours(rows: int, compiled: bool = False) -> Callable[[], None]:
    """A step of the preset, by Tinsmith."""
    lm = LM(ModelConfig.preset("minimind2-26m")).train()
    if compiled:
        lm.compile()
    optimizer = _adamw(lm)
    ids = _ids(rows)
    everything = torch.ones(rows, CONTEXT, dtype=torch.bool)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = lm(ids[:, :-1], logits=False)
            total = summed_nll(out.hidden, ids[:, 1:], everything, lm.head)
        (total / everything.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def theirs(rows: int, compiled: bool = False) -> Callable[[], None]:
    """A step of the same sizes, by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=6400,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    model = LlamaForCausalLM(config).train()
    optimizer = _adamw(model)
    forward = torch.compile(model) if compiled else model
    ids = _ids(rows)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ids = ids[:, :-1].contiguous()
    return step


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def _ids(rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 6400, (rows, CONTEXT + 1), generator=generator)


def product_rate() -> Callable[[], None]:
    """bf16 products of the shape of a feed-forward, as a yardstick."""
    x, w = torch.randn(4096, 512).bfloat16(), torch.randn(512, 1408).bfloat16()

    def work() -> None:
        for _ in range(20):
            torch.mm(x, w)

    return work


PRODUCT_FLOP = 20 * 2 * 4096 * 512 * 1408


def peak(side: str, rows: int) -> float:
    """Bytes at most of a process that takes three eager steps."""
    command = [sys.executable, __file__, "--peak", side, "--rows", str(rows)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step beside transformers' Llama.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--peak", choices=[OURS, THEIRS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = arguments.rows
    if arguments.peak:
        step = (ours if arguments.peak == OURS else theirs)(rows)
        for _ in range(3):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    # first, while this process is small: a child begins with its parent's peak
    peaks = {side: peak(side, rows) for side in (OURS, THEIRS)}
    contestants = {OURS: ours(rows), THEIRS: theirs(rows), "bf16 products": product_rate()}
    if not arguments.no_compile:
        contestants |= {
            f"{OURS}, compiled": ours(rows, True),
            f"{THEIRS}, compiled": theirs(rows, True),
        }
    seconds = interleave(contestants, arguments.rounds, warmup=2)
    report(seconds, rows, peaks)


def report(seconds: dict[str, list[float]], rows: int, peaks: dict[str, float]) -> None:
    """Table, ratios as medians over rounds, JSON."""
    middle = medians(seconds)
    rate = PRODUCT_FLOP / middle["bf16 products"]
    with torch.device("meta"):
        flop = 3 * LM(ModelConfig.preset("minimind2-26m")).flops(CONTEXT) * rows * CONTEXT
    names = [name for name in middle if name != "bf16 products"]
    table(
        [
            {
                "25.8M, 8 x 512, bf16": name,
                "s": middle[name],
                "tok/s": rows * CONTEXT / middle[name],
                "share of product rate": f"{flop / middle[name] / rate:.1%}",
                "peak MB": f"{peaks[name] / 1e6:.0f}" if name in peaks else "",
            }
            for name in names
        ]
    )
    ratios = {}
    for mine, peer in (
        (OURS, THEIRS),
        *((f"{OURS}, compiled", p) for p in names[-1:] + names[1:2]),
    ):
        if mine in seconds and peer != mine:
            pairs = zip(seconds[mine], seconds[peer], strict=True)
            each = sorted(b / a for a, b in pairs)
            ratios[f"{mine} / {peer}"] = each[len(each) // 2]
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} times as fast (median of pairs)")
    print(f"bf16 products {rate / 1e9:.0f} GFLOP/s")
    data = {"rows": rows, "context": CONTEXT, "seconds": seconds, "ratios": ratios}
    print(write("train", data | {"peak_bytes": peaks, "bf16_flop_per_second": rate}))


if __name__ == "__main__":
    main()

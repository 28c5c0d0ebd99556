"""Compares speed and memory of a training step with transformers' Llama, with the same AdamW.

    python benchmarks/train.py [--rounds 7] [--rows 8] [--no-compile]

The 25.8M preset, `--rows` x 512 random tokens, bf16 autocast. Bounds: eager at least 1.1 times as
fast as transformers; compiled at least 1.1 times as fast as compiled transformers and 1.35 times as
fast as eager transformers; peak memory (of eager steps in separate processes) not above
transformers'.
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

SEQ_LEN = 512
TINSMITH, TRANSFORMERS = "tinsmith", "transformers"


def tinsmith_step(rows: int, compiled: bool = False) -> Callable[[], None]:
    """Return a training step of the preset by Tinsmith."""
    lm = LM(ModelConfig.preset("minimind2-26m")).train()
    if compiled:
        lm.compile()
    optimizer = _adamw(lm)
    ids = _ids(rows)
    loss_mask = torch.ones(rows, SEQ_LEN, dtype=torch.bool)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = lm(ids[:, :-1], logits=False)
            total = summed_nll(out.hidden, ids[:, 1:], loss_mask, lm.head)
        (total / loss_mask.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def transformers_step(rows: int, compiled: bool = False) -> Callable[[], None]:
    """Return a training step of the same sizes by transformers."""
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
    return torch.randint(0, 6400, (rows, SEQ_LEN + 1), generator=generator)


def product_rate() -> Callable[[], None]:
    """Return bf16 matrix products of the shape of a feed-forward, as a reference for FLOP/s."""
    x, w = torch.randn(4096, 512).bfloat16(), torch.randn(512, 1408).bfloat16()

    def work() -> None:
        for _ in range(20):
            torch.mm(x, w)

    return work


PRODUCT_FLOP = 20 * 2 * 4096 * 512 * 1408


def peak(side: str, rows: int) -> float:
    """Return the peak bytes of a process that takes three eager steps."""
    command = [sys.executable, __file__, "--peak", side, "--rows", str(rows)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A training step by Tinsmith and by transformers' Llama."
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--peak", choices=[TINSMITH, TRANSFORMERS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = arguments.rows
    if arguments.peak:
        step = (tinsmith_step if arguments.peak == TINSMITH else transformers_step)(rows)
        for _ in range(3):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    # first, while this process is small: a child process starts with its parent's peak
    peaks = {side: peak(side, rows) for side in (TINSMITH, TRANSFORMERS)}
    contestants = {
        TINSMITH: tinsmith_step(rows),
        TRANSFORMERS: transformers_step(rows),
        "bf16 products": product_rate(),
    }
    if not arguments.no_compile:
        contestants |= {
            f"{TINSMITH}, compiled": tinsmith_step(rows, True),
            f"{TRANSFORMERS}, compiled": transformers_step(rows, True),
        }
    seconds = interleave(contestants, arguments.rounds, warmup=2)
    report(seconds, rows, peaks)


def report(seconds: dict[str, list[float]], rows: int, peaks: dict[str, float]) -> None:
    """Print a table and the median ratios over rounds, and write the JSON file."""
    median_seconds = medians(seconds)
    rate = PRODUCT_FLOP / median_seconds["bf16 products"]
    with torch.device("meta"):
        flop = 3 * LM(ModelConfig.preset("minimind2-26m")).flops(SEQ_LEN) * rows * SEQ_LEN
    names = [name for name in median_seconds if name != "bf16 products"]
    table(
        [
            {
                "25.8M, 8 x 512, bf16": name,
                "s": median_seconds[name],
                "tok/s": rows * SEQ_LEN / median_seconds[name],
                "share of product rate": f"{flop / median_seconds[name] / rate:.1%}",
                "peak MB": f"{peaks[name] / 1e6:.0f}" if name in peaks else "",
            }
            for name in names
        ]
    )
    ratios = {}
    for own, peer in (
        (TINSMITH, TRANSFORMERS),
        *((f"{TINSMITH}, compiled", p) for p in names[-1:] + names[1:2]),
    ):
        if own in seconds and peer != own:
            pairs = zip(seconds[own], seconds[peer], strict=True)
            each = sorted(b / a for a, b in pairs)
            ratios[f"{own} / {peer}"] = each[len(each) // 2]
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} times as fast (median of pairs)")
    print(f"bf16 products {rate / 1e9:.0f} GFLOP/s")
    data = {"rows": rows, "context": SEQ_LEN, "seconds": seconds, "ratios": ratios}
    print(write("train", data | {"peak_bytes": peaks, "bf16_flop_per_second": rate}))


if __name__ == "__main__":
    main()

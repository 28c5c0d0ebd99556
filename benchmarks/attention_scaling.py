"""Time and memory of every kind of attention against the length of the context.

    python benchmarks/attention_scaling.py [--lengths 1k 2k 4k] [--dtype bfloat16] [--paper]

One layer of width 512 with 8 query heads of 64, one row: forward and backward in training mode
(with the loss of an indexer, where there is one), and one decoding step with a cache of that
length; the peak of the memory of each, in processes of their own (Linux). `dense` is Tinsmith's
own, `torch` the same layer with torch's kernel. The bounds are on nsa in float32: 2.5 times as fast
as the faster of the two at 32k tokens, 4 times at 64k, and at most 2.5 times the time for twice the
length from 8k to 32k.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, interleave, medians, table, write

from tinsmith.core.parse import parse
from tinsmith.nn.attention import core
from tinsmith.nn.attention.rope import Rope, rotary_tables
from tinsmith.nn.contract import BuildContext, Ctx, Mixer
from tinsmith.nn.mixers import MixerConfig

DIM = 512
GROUPED: dict[str, Any] = {"heads": 8, "kv_heads": 2, "head_dim": 64}
SMALL = {"compress_block": 64, "compress_stride": 32, "select_block": 64, "select_count": 8}
PAPER = {"compress_block": 32, "compress_stride": 16, "select_block": 64, "select_count": 16}
MIXERS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "gqa", **GROUPED},
    "torch": {"kind": "gqa", **GROUPED},
    "window": {"kind": "gqa", **GROUPED, "window": 256},
    "mla": {"kind": "mla"},
    "nsa": {"kind": "nsa", **GROUPED, **SMALL, "window": 256},
    "dsa": {"kind": "dsa"},
    "hybrid": {"kind": "hybrid", "mode": "nsa"},
}
LENGTHS = ["1k", "2k", "4k", "8k", "16k", "32k", "64k"]
PATIENCE = 5.0
"""Seconds of one forward and backward pass beyond which longer contexts are not trained on, but for
those that the bounds are about.
"""
BOUND = ("torch", "nsa")
DECODED = 32768
"""Tokens of a cache up to which all decode; beyond, those that are trained."""
STEPS = 17


def layer(name: str, dtype: torch.dtype, paper: bool) -> Mixer:
    """A layer in training mode, the same weights for the same arguments."""
    torch.manual_seed(0)
    config = MIXERS[name] | (PAPER | {"window": 512} if paper and name == "nsa" else {})
    return parse(MixerConfig, config).build(BuildContext(DIM, 0, 8)).to(dtype).train()


def context(mixer: Mixer, begin: int, count: int, dtype: torch.dtype) -> Ctx:
    """Positions of one row, and their tables."""
    positions = torch.arange(begin, begin + count)[None]
    dim = mixer.rotary_dim
    rotary = {dim: rotary_tables(Rope(), dim, positions, dtype)} if dim else {}
    return Ctx(positions, None, None, rotary)


class TorchKernel:
    """Inside, attention is torch's."""

    def __enter__(self) -> None:
        self.before, core._use_blockwise = core._use_blockwise, lambda *_: False

    def __exit__(self, *error: object) -> None:
        core._use_blockwise = self.before


def train_step(name: str, length: int, dtype: torch.dtype, paper: bool) -> Any:
    """Forward and backward of one row."""
    mixer = layer(name, dtype, paper)
    x = torch.randn(1, length, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    x, ctx = x.requires_grad_(), context(mixer, 0, length, dtype)

    def work() -> None:
        out = mixer(x, ctx)
        loss = out.y.float().square().mean() + sum(out.losses.values(), torch.zeros(()))
        loss.backward()

    def torchs() -> None:
        with TorchKernel():
            work()

    return torchs if name == "torch" else work


@torch.no_grad()
def decode_step(name: str, length: int, dtype: torch.dtype, paper: bool) -> Any:
    """One token after `length` others; each call adds one more to the cache."""
    mixer = layer(name, dtype, paper).eval()
    cache = mixer.new_cache(1, length + 64, dtype, torch.device("cpu"))
    source = torch.Generator().manual_seed(1)
    for begin in range(0, length, 4096):
        count = min(4096, length - begin)
        chunk = torch.randn(1, count, DIM, generator=source).to(dtype)
        mixer(chunk, context(mixer, begin, count, dtype), cache)
    x, ctx = torch.randn(1, 1, DIM, generator=source).to(dtype), context(mixer, length, 1, dtype)

    @torch.no_grad()
    def work() -> float:
        began = time.perf_counter()
        mixer(x, ctx, cache)
        return time.perf_counter() - began

    return work, cache.nbytes()


def megabytes() -> float:
    """The most memory that this process has had. Not `ru_maxrss`: a child starts with that of its
    parent.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> None:
    """The most memory of this process is what it has now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def alone(what: str, name: str, length: int, dtype: str, paper: bool) -> dict[str, float]:
    """One case in a process of its own."""
    command = [sys.executable, __file__, "--alone", what, name, "--lengths", str(length)]
    command += ["--dtype", dtype, *(["--paper"] if paper else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory_of_training(name: str, length: int, dtype: torch.dtype, paper: bool) -> dict[str, float]:
    """Of a first step, in megabytes."""
    before = megabytes()
    train_step(name, length, dtype, paper)()
    return {"peak_mb": megabytes() - before}


def decoding(name: str, length: int, dtype: torch.dtype, paper: bool) -> dict[str, float]:
    """Time of a step, what it takes beside the cache, and the cache."""
    work, held = decode_step(name, length, dtype, paper)
    forget_peak()
    before = megabytes()
    times = sorted(work() for _ in range(STEPS))
    found = {"decode_ms": 1000 * times[STEPS // 2], "decode_mb": megabytes() - before}
    return found | {"cache_mb": held / 2**20}


ALONE = {"train": memory_of_training, "decode": decoding}


def measure(lengths: list[int], dtype: str, paper: bool) -> list[dict[str, Any]]:
    """A row a length and mixer."""
    kind, rows, slow = getattr(torch, dtype), [], set()
    for length in lengths:
        contestants = {
            name: train_step(name, length, kind, paper) for name in MIXERS if name not in slow
        }
        many = length <= DECODED
        seconds = medians(interleave(contestants, 3 if many else 1, warmup=int(length <= 8192)))
        here = []
        for name in MIXERS if many else seconds:
            row: dict[str, Any] = {"tokens": length, "mixer": name}
            row |= {"train_s": None, "peak_mb": None}
            if name in seconds:
                row["train_s"] = seconds[name]
                row |= alone("train", name, length, dtype, paper)
            here.append(row | alone("decode", name, length, dtype, paper))
        slow |= {name for name, each in seconds.items() if each > PATIENCE} - set(BOUND)
        table(here)
        rows += here
    return rows


def verdicts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the bounds are about, as far as it was measured."""
    trained = [row for row in rows if row["train_s"] is not None]
    time_of = {(row["mixer"], row["tokens"]): row["train_s"] for row in trained}
    peak_of = {(row["mixer"], row["tokens"]): row["peak_mb"] for row in trained}

    def dense(length: int) -> float:
        return min(time_of.get((name, length), math.inf) for name in ("dense", "torch"))

    output: dict[str, Any] = {}
    for (name, length), seconds in time_of.items():
        if name == "nsa" and math.isfinite(dense(length)):
            output[f"nsa against dense at {length}"] = dense(length) / seconds
        if name == "nsa" and (name, length // 2) in time_of:
            output[f"nsa, time of {length} to {length // 2}"] = seconds / time_of[name, length // 2]
            memory = peak_of[name, length] / peak_of[name, length // 2]
            output[f"nsa, memory of {length} to {length // 2}"] = memory
    return output


def draw(rows: list[dict[str, Any]], name: str) -> None:
    """Time, memory and decoding against length, beside the JSON."""
    import matplotlib.pyplot as plt

    panels = {
        "train_s": "forward and backward, seconds",
        "peak_mb": "peak memory, MB",
        "decode_ms": "one decoding step, ms",
    }
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5))
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for mixer in MIXERS:
            mine = [row for row in rows if row["mixer"] == mixer]
            mine = [row for row in mine if row[key] is not None]
            axis.plot([r["tokens"] for r in mine], [r[key] for r in mine], "o-", label=mixer)
        axis.set(xscale="log", yscale="log", xlabel="tokens of context", title=title)
        ticks = sorted({row["tokens"] for row in rows})
        axis.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention against the length of its context.")
    parser.add_argument("--lengths", nargs="+", default=LENGTHS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--paper", action="store_true", help="nsa with the paper's sizes")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    requested = parser.parse_args()
    lengths = [
        int(each.removesuffix("k")) * (1024 if "k" in each else 1) for each in requested.lengths
    ]
    if requested.alone:
        what, name = requested.alone
        case = (name, lengths[0], getattr(torch, requested.dtype), requested.paper)
        print(json.dumps(ALONE[what](*case)))
        return
    rows = measure(lengths, requested.dtype, requested.paper)
    name = "attention_scaling" + ("_paper" if requested.paper else "")
    name += "" if requested.dtype == "float32" else f"_{requested.dtype}"
    output = verdicts(rows)
    for what, ratio in output.items():
        print(f"{what}: {ratio:.2f}")
    draw(rows, name)
    print(write(name, {"dtype": requested.dtype, "rows": rows, "ratios": output}))


if __name__ == "__main__":
    main()

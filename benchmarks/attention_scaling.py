"""Measures time and memory of every mixer by sequence length.

    python benchmarks/attention_scaling.py [--lengths 1k 2k 4k] [--dtype bfloat16] [--paper]

One layer of width 512 with 8 query heads of 64, batch size 1: forward and backward in training mode
(with the indexer's loss, if there is one), and one decoding step with a cache of that length. The
peak memory of each is measured in a separate process (Linux). `dense` is Tinsmith's attention,
`torch` the same layer with torch's kernel. The bounds apply to nsa in float32: 2.5 times as fast as
the faster of the two at 32k tokens, 4 times at 64k, and at most 2.5 times the time for twice the
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
MAX_SECONDS = 5.0
"""A mixer whose forward and backward pass takes longer is not trained on longer sequences, unless a
bound needs it.
"""
BOUND = ("torch", "nsa")
MAX_DECODED = 32768
"""Cache length up to which all mixers decode; beyond it only mixers that are trained."""
STEPS = 17


def layer(name: str, dtype: torch.dtype, paper: bool) -> Mixer:
    """Return a layer in training mode with the same weights for the same arguments."""
    torch.manual_seed(0)
    config = MIXERS[name] | (PAPER | {"window": 512} if paper and name == "nsa" else {})
    return parse(MixerConfig, config).build(BuildContext(DIM, 0, 8)).to(dtype).train()


def context(mixer: Mixer, begin: int, count: int, dtype: torch.dtype) -> Ctx:
    """Return the context of one row: positions and rotary tables."""
    positions = torch.arange(begin, begin + count)[None]
    dim = mixer.rotary_dim
    rotary = {dim: rotary_tables(Rope(), dim, positions, dtype)} if dim else {}
    return Ctx(positions, None, None, rotary)


class TorchKernel:
    """Context manager in which attention uses torch's kernel."""

    def __enter__(self) -> None:
        self.before, core._use_blockwise = core._use_blockwise, lambda *_: False

    def __exit__(self, *error: object) -> None:
        core._use_blockwise = self.before


def train_step(name: str, length: int, dtype: torch.dtype, paper: bool) -> Any:
    """Return a function that runs forward and backward of one row."""
    mixer = layer(name, dtype, paper)
    x = torch.randn(1, length, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    x, ctx = x.requires_grad_(), context(mixer, 0, length, dtype)

    def step() -> None:
        out = mixer(x, ctx)
        loss = out.y.float().square().mean() + sum(out.losses.values(), torch.zeros(()))
        loss.backward()

    def step_with_torch_kernel() -> None:
        with TorchKernel():
            step()

    return step_with_torch_kernel if name == "torch" else step


@torch.no_grad()
def decode_step(name: str, length: int, dtype: torch.dtype, paper: bool) -> Any:
    """Return a function that decodes one token after `length` others, and the cache's bytes."""
    mixer = layer(name, dtype, paper).eval()
    cache = mixer.new_cache(1, length + 64, dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for begin in range(0, length, 4096):
        count = min(4096, length - begin)
        chunk = torch.randn(1, count, DIM, generator=generator).to(dtype)
        mixer(chunk, context(mixer, begin, count, dtype), cache)
    x, ctx = torch.randn(1, 1, DIM, generator=generator).to(dtype), context(mixer, length, 1, dtype)

    @torch.no_grad()
    def step() -> float:
        start = time.perf_counter()
        mixer(x, ctx, cache)
        return time.perf_counter() - start

    return step, cache.nbytes()


def peak_megabytes() -> float:
    """Return the peak resident memory of this process. `ru_maxrss` of a child process would start
    with its parent's value.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def reset_peak() -> None:
    """Reset the peak memory of this process to its present memory."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def run_in_process(part: str, name: str, length: int, dtype: str, paper: bool) -> dict[str, float]:
    """Measure one case in a new process."""
    command = [sys.executable, __file__, "--alone", part, name, "--lengths", str(length)]
    command += ["--dtype", dtype, *(["--paper"] if paper else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def training_memory(name: str, length: int, dtype: torch.dtype, paper: bool) -> dict[str, float]:
    """Return the peak memory of a first training step in megabytes."""
    before = peak_megabytes()
    train_step(name, length, dtype, paper)()
    return {"peak_mb": peak_megabytes() - before}


def decoding_cost(name: str, length: int, dtype: torch.dtype, paper: bool) -> dict[str, float]:
    """Return the time of a decoding step, its memory without the cache, and the cache's memory."""
    step, cache_bytes = decode_step(name, length, dtype, paper)
    reset_peak()
    before = peak_megabytes()
    times = sorted(step() for _ in range(STEPS))
    result = {"decode_ms": 1000 * times[STEPS // 2], "decode_mb": peak_megabytes() - before}
    return result | {"cache_mb": cache_bytes / 2**20}


PARTS = {"train": training_memory, "decode": decoding_cost}


def measure(lengths: list[int], dtype: str, paper: bool) -> list[dict[str, Any]]:
    """Measure all mixers and return a record for each length and mixer."""
    torch_dtype, records, slow = getattr(torch, dtype), [], set()
    for length in lengths:
        contestants = {
            name: train_step(name, length, torch_dtype, paper)
            for name in MIXERS
            if name not in slow
        }
        all_mixers = length <= MAX_DECODED
        seconds = medians(
            interleave(contestants, 3 if all_mixers else 1, warmup=int(length <= 8192))
        )
        of_length = []
        for name in MIXERS if all_mixers else seconds:
            record: dict[str, Any] = {"tokens": length, "mixer": name}
            record |= {"train_s": None, "peak_mb": None}
            if name in seconds:
                record["train_s"] = seconds[name]
                record |= run_in_process("train", name, length, dtype, paper)
            of_length.append(record | run_in_process("decode", name, length, dtype, paper))
        slow |= {name for name, each in seconds.items() if each > MAX_SECONDS} - set(BOUND)
        table(of_length)
        records += of_length
    return records


def ratios_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the ratios that the bounds apply to, as far as they were measured."""
    trained = [record for record in records if record["train_s"] is not None]
    time_of = {(record["mixer"], record["tokens"]): record["train_s"] for record in trained}
    peak_of = {(record["mixer"], record["tokens"]): record["peak_mb"] for record in trained}

    def dense(length: int) -> float:
        return min(time_of.get((name, length), math.inf) for name in ("dense", "torch"))

    ratios: dict[str, Any] = {}
    for (name, length), seconds in time_of.items():
        if name == "nsa" and math.isfinite(dense(length)):
            ratios[f"nsa against dense at {length}"] = dense(length) / seconds
        if name == "nsa" and (name, length // 2) in time_of:
            ratios[f"nsa, time of {length} to {length // 2}"] = seconds / time_of[name, length // 2]
            memory = peak_of[name, length] / peak_of[name, length // 2]
            ratios[f"nsa, memory of {length} to {length // 2}"] = memory
    return ratios


def draw(records: list[dict[str, Any]], name: str) -> None:
    """Draw time, memory and decoding by length, in the folder of the JSON file."""
    import matplotlib.pyplot as plt

    panels = {
        "train_s": "forward and backward, seconds",
        "peak_mb": "peak memory, MB",
        "decode_ms": "one decoding step, ms",
    }
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5))
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for mixer in MIXERS:
            of_mixer = [record for record in records if record["mixer"] == mixer]
            of_mixer = [record for record in of_mixer if record[key] is not None]
            axis.plot(
                [r["tokens"] for r in of_mixer], [r[key] for r in of_mixer], "o-", label=mixer
            )
        axis.set(xscale="log", yscale="log", xlabel="tokens of context", title=title)
        ticks = sorted({record["tokens"] for record in records})
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
    arguments = parser.parse_args()
    lengths = [
        int(each.removesuffix("k")) * (1024 if "k" in each else 1) for each in arguments.lengths
    ]
    if arguments.alone:
        part, name = arguments.alone
        case = (name, lengths[0], getattr(torch, arguments.dtype), arguments.paper)
        print(json.dumps(PARTS[part](*case)))
        return
    records = measure(lengths, arguments.dtype, arguments.paper)
    name = "attention_scaling" + ("_paper" if arguments.paper else "")
    name += "" if arguments.dtype == "float32" else f"_{arguments.dtype}"
    ratios = ratios_of(records)
    for what, ratio in ratios.items():
        print(f"{what}: {ratio:.2f}")
    draw(records, name)
    print(write(name, {"dtype": arguments.dtype, "rows": records, "ratios": ratios}))


if __name__ == "__main__":
    main()

"""Compares a training step of models with experts with dense ones and transformers' Qwen3-MoE.

    python benchmarks/experts.py [--rounds 7] [--rows 8] [--only NAME]

The bounds are on speed relative to a dense step with the same active parameters: 2 of 4 experts and
a shared one (the 145M preset) at least 0.75; 6 of 64 and 2 shared ones of width 256 at least 0.55;
32 of width 96 by dyn_moe, 8 active, at least 0.4. All three must be faster than a dense step of the
same total parameters, and the first at least 1.3 times as fast as transformers' Qwen3-MoE of the
same sizes with bf16 weights on both sides. Peak memory (in separate processes) must not grow with
inactive experts beyond weights, gradients and moments. All contestants take turns in one run, with
the same AdamW.
"""

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from common import interleave, table, write
from torch import nn

from tinsmith import LM, ModelConfig
from tinsmith.losses.logprobs import summed_nll
from tinsmith.train.setup import keep_freed_memory

CONTEXT = 512
TOP_K = {"kind": "topk_moe", "experts": 4, "top_k": 2, "n_shared_experts": 1, "hidden_dim": 1728}
MANY = {"kind": "deepseek_moe", "experts": 64, "top_k": 6, "n_shared_experts": 2, "hidden_dim": 256}
DYNAMIC = {"kind": "dyn_moe", "experts": 32, "hidden_dim": 96, "target_active": 8}


class Case(NamedTuple):
    """A feed-forward with experts in a model of `dim` and `depth`, and the speed relative to the
    dense step that it must reach.
    """

    dim: int
    depth: int
    feed: dict[str, Any]
    active: int
    total: int
    """`active` and `total` are the widths of dense feed-forwards with that many parameters."""
    bound: float


CASES = {
    "topk": Case(640, 8, TOP_K, 3 * 1728, 5 * 1728, 0.75),
    "many": Case(512, 8, MANY, 8 * 256, 66 * 256, 0.55),
    "dynamic": Case(512, 8, DYNAMIC, 8 * 96, 32 * 96, 0.4),
}


def model(case: Case, feed: dict[str, Any]) -> LM:
    """Return a model of the case with another feed-forward."""
    layer = {"mixer": {"kind": "gqa", "heads": 8, "kv_heads": 2}, "feed_forward": feed}
    section = {"vocab_size": 6400, "dim": case.dim, "depth": case.depth, "pattern": [layer]}
    torch.manual_seed(0)
    return LM(ModelConfig.from_dict(section)).train()


@torch.no_grad()
def set_thresholds(lm: LM, target: float, rows: int) -> None:
    """Set thresholds at which a token has `target` experts, as after training. At initialisation
    half of the experts are active.
    """
    thresholds = [value for name, value in lm.named_parameters() if name.endswith("thresholds")]
    low, high = -1.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        for threshold in thresholds:
            threshold.fill_(middle)
        low, high = (middle, high) if _active(lm, rows) > target else (low, middle)


def _active(lm: LM, rows: int) -> float:
    """Return the mean number of experts of a token over all layers."""
    stats = lm(_ids(rows)[:, :-1]).stats
    load, tokens = (
        sum(float(value.sum()) for name, value in stats.items() if name.endswith(end))
        for end in (".load", ".tokens")
    )
    return load / tokens


def swiglu(hidden: int) -> dict[str, Any]:
    """Return a dense feed-forward section."""
    return {"kind": "swiglu", "hidden_dim": hidden}


def step_of(lm: LM, rows: int) -> Callable[[], None]:
    """Return a training step in bf16 autocast, or without autocast for a model in bf16."""
    optimizer, ids = _adamw(lm), _ids(rows)
    loss_mask = torch.ones(rows, CONTEXT, dtype=torch.bool)
    autocast = lm.embed.weight.dtype == torch.float32

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = lm(ids[:, :-1], logits=False)
            total = summed_nll(out.hidden, ids[:, 1:], loss_mask, lm.head)
        (total / loss_mask.numel() + sum(out.losses.values())).backward()
        optimizer.step()
        lm.zero_grad()
        lm.post_step(out.stats)

    return step


def transformers_step(rows: int) -> Callable[[], None]:
    """Return a step of transformers' Qwen3-MoE with the sizes of `qwen`, weights in bf16."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    case = CASES["topk"]
    config = Qwen3MoeConfig(
        vocab_size=6400,
        hidden_size=case.dim,
        num_hidden_layers=case.depth,
        num_attention_heads=8,
        num_key_value_heads=2,
        moe_intermediate_size=1728,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        output_router_logits=True,
        tie_word_embeddings=True,
    )
    model = Qwen3MoeForCausalLM(config).bfloat16().train()
    optimizer, ids = _adamw(model), _ids(rows)[:, :-1].contiguous()

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def qwen() -> LM:
    """Return the first case as a Qwen3-MoE, weights in bf16."""
    case = CASES["topk"]
    gqa = {"kind": "gqa", "heads": 8, "kv_heads": 2, "qk_norm": True}
    layer = {"mixer": gqa, "feed_forward": TOP_K | {"n_shared_experts": 0}}
    section = {"vocab_size": 6400, "dim": case.dim, "depth": case.depth, "pattern": [layer]}
    return LM(ModelConfig.from_dict(section)).bfloat16().train()


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW on all parameters except thresholds, so that the number of experts is fixed."""
    trained = [value for name, value in model.named_parameters() if ".feed.gate." not in name]
    return torch.optim.AdamW(trained, lr=1e-4, fused=True)


def _ids(rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 6400, (rows, CONTEXT + 1), generator=generator)


def peak(experts: int, rows: int) -> float:
    """Return the peak bytes of a process that trains the second case with so many experts for three
    steps, minus 16 for each parameter: weight, gradient, two moments.
    """
    command = [sys.executable, __file__, "--peak", str(experts), "--rows", str(rows)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(experts: int, rows: int) -> None:
    """Measure and print the value that `peak` reads."""
    lm = model(CASES["many"], MANY | {"experts": experts})
    step = step_of(lm, rows)
    for _ in range(3):
        step()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(most - 16 * lm.parameter_count())


def compare(name: str, rounds: int, rows: int) -> dict[str, Any]:
    """Measure one case and its two dense models."""
    case = CASES[name]
    sides = {"routed": case.feed, "active": swiglu(case.active), "total": swiglu(case.total)}
    models = {side: model(case, feed) for side, feed in sides.items()}
    if case.feed["kind"] == "dyn_moe":
        set_thresholds(models["routed"], case.feed["target_active"], rows)
    steps = {side: step_of(lm, rows) for side, lm in models.items()}
    seconds = interleave(steps, rounds, warmup=2)
    shares = {side: _ratio(seconds[side], seconds["routed"]) for side in ("active", "total")}
    return {"seconds": seconds, "of_dense": shares, "bounds": {"active": case.bound, "total": 1.0}}


def compare_with_transformers(rounds: int, rows: int) -> dict[str, Any]:
    """Measure the first case as a Qwen3-MoE in both libraries."""
    torch.manual_seed(0)
    steps = {"tinsmith": step_of(qwen(), rows), "transformers": transformers_step(rows)}
    seconds = interleave(steps, rounds, warmup=2)
    ratio = _ratio(seconds["transformers"], seconds["tinsmith"])
    return {"seconds": seconds, "times_as_fast": ratio, "bound": 1.3}


def _ratio(slow: list[float], fast: list[float]) -> float:
    """Return the median ratio over rounds."""
    each = sorted(a / b for a, b in zip(slow, fast, strict=True))
    return each[len(each) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of models with experts.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--only", choices=[*CASES, "transformers", "memory"])
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rounds, rows = arguments.rounds, arguments.rows
    keep_freed_memory()  # as the trainer does; this makes all contestants faster
    if arguments.peak:
        print_peak(arguments.peak, rows)
        return
    selected = [arguments.only] if arguments.only else ["memory", *CASES, "transformers"]
    results: dict[str, Any] = {}
    if (
        "memory" in selected
    ):  # first, while this process is small: a child process starts with its peak
        results["memory"] = {str(experts): peak(experts, rows) for experts in (8, 64)}
    results |= {name: compare(name, rounds, rows) for name in selected if name in CASES}
    if "transformers" in selected:
        results["transformers"] = compare_with_transformers(rounds, rows)
    report(results)
    print(write("experts", {"rows": rows, "context": CONTEXT, "results": results}))


def report(results: dict[str, Any]) -> None:
    """Print a table of ratios and bounds."""
    lines = []
    for name in CASES:
        for side, share in results.get(name, {}).get("of_dense", {}).items():
            bound = results[name]["bounds"][side]
            lines.append({"case": f"{name}, of dense {side}", "ratio": share, "at least": bound})
    if "transformers" in results:
        ratio = results["transformers"]["times_as_fast"]
        lines.append({"case": "transformers' Qwen3-MoE", "ratio": ratio, "at least": 1.3})
    if lines:
        table(lines)
    for experts, peak_bytes in results.get("memory", {}).items():
        print(f"{experts} experts: {peak_bytes / 1e6:.0f} MB beside weights, gradients and moments")
    if "memory" in results:
        few, many = results["memory"].values()
        print(f"56 more experts: {(many / few - 1) * 100:+.1f} % of that (0: nothing but weights)")


if __name__ == "__main__":
    main()

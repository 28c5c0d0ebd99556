"""Compares greedy decoding of the 25.8M preset with transformers' `generate`, on the same weights.

Prompts of 64 tokens, 128 new tokens, 2 threads, contestants in turns. Weights are random, and
query, key, output and down projections are enlarged: with the default initialisation and a tied
head a model repeats its last token, and equal ids would prove nothing (`distinct` is the mean
number of different ids in a completion). `ragged`, with prompts of 8 to 64 tokens, has no bound.

    python benchmarks/decode.py [--rounds 9] [--compile]
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from common import interleave, medians, table, write
from transformers import LlamaConfig, LlamaForCausalLM

from tinsmith.infer.engine import Engine
from tinsmith.infer.sample import SamplingParams
from tinsmith.nn.mixers.gqa import GQAMixer
from tinsmith.nn.model import LM, ModelConfig

PRESET = "minimind2-26m"
PROMPT, NEW = 64, 128
LARGER = {"q_proj": 4, "k_proj": 4, "o_proj": 8, "down_proj": 8}
GREEDY = SamplingParams(temperature=0)
CASES = ((1, torch.float32, 1.5), (8, torch.float32, 1.25), (8, torch.bfloat16, 1.5))
"""(batch size, precision, speed relative to transformers that is the goal)."""

Prompts = Sequence[list[int]]


def tinsmith_model(dtype: torch.dtype) -> LM:
    """Return the preset with random weights."""
    torch.manual_seed(0)
    lm = LM(ModelConfig.preset(PRESET))
    with torch.no_grad():
        for name, weight in lm.named_parameters():
            weight *= LARGER.get(name.split(".")[-2], 1)
    return lm.to(dtype).eval()


def transformers_model(lm: LM) -> LlamaForCausalLM:
    """Return transformers' Llama with the same weights."""
    mixer, feed = lm.blocks[0].mixer, lm.config.layers[0].feed_forward
    assert isinstance(mixer, GQAMixer)
    config = LlamaConfig(
        vocab_size=lm.config.vocab_size,
        hidden_size=lm.config.dim,
        intermediate_size=feed.hidden_dim,
        num_hidden_layers=lm.config.depth,
        num_attention_heads=mixer.heads,
        num_key_value_heads=mixer.num_kv_heads,
        max_position_embeddings=lm.config.max_seq_len,
        rms_norm_eps=lm.config.norm_eps,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": lm.config.rope.theta},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    weights = {"model.embed_tokens.weight": lm.embed.weight, "model.norm.weight": lm.norm.weight}
    weights["lm_head.weight"] = lm.head.weight
    for index, block in enumerate(lm.blocks):
        names = {"mix_norm": "input_layernorm", "feed_norm": "post_attention_layernorm"}
        for name, weight in block.named_parameters():
            hf_name = name.replace("mixer.", "self_attn.").replace("feed.", "mlp.")
            for own, other in names.items():
                hf_name = hf_name.replace(own, other)
            weights[f"model.layers.{index}.{hf_name}"] = weight
    model: Any = LlamaForCausalLM(config)
    model.to(lm.embed.weight.dtype).load_state_dict(weights, strict=True)
    return model.eval()


def generate_with_engine(engine: Engine, prompts: Prompts) -> list[list[int]]:
    """Return greedy completions by the engine, which is built once, as in a server or a chat."""
    completions: dict[int, list[int]] = {engine.add(ids, GREEDY, NEW): [] for ids in prompts}
    for event in engine.run():
        assert event.token is not None
        completions[event.request_id].append(event.token)
    return list(completions.values())


@torch.inference_mode()
def generate(model: Any, prompts: Prompts) -> list[list[int]]:
    """Return greedy completions by transformers, with prompts padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    return out[:, width:].tolist()


def random_prompts(rows: int, ragged: bool) -> list[list[int]]:
    """Return random prompts, of different lengths if `ragged`."""
    generator = torch.Generator().manual_seed(1)
    lengths = [PROMPT - 8 * row if ragged else PROMPT for row in range(rows)]
    return [torch.randint(0, 6400, (n,), generator=generator).tolist() for n in lengths]


def case(
    rows: int, dtype: torch.dtype, goal: float | None, ragged: bool, rounds: int, compiled: bool
) -> list[dict[str, Any]]:
    """Return the table rows of one batch size and precision."""
    prompts, lm = random_prompts(rows, ragged), tinsmith_model(dtype)
    model = transformers_model(lm)
    engines = {"tinsmith": Engine(lm, max_batch_size=rows)}
    if compiled:
        other = tinsmith_model(dtype)
        other.compile(fullgraph=True)
        engines["tinsmith, compiled"] = Engine(other, max_batch_size=rows)
    expected = generate(model, prompts)
    equal = {
        name: share_of_equal(generate_with_engine(each, prompts), expected)
        for name, each in engines.items()
    }
    runs: dict[str, Any] = {"transformers": lambda: generate(model, prompts)}
    runs |= {
        name: lambda each=each: generate_with_engine(each, prompts)
        for name, each in engines.items()
    }
    seconds = medians(interleave(runs, rounds))
    size = f"{rows} x {str(dtype).removeprefix('torch.')}{', ragged' if ragged else ''}"
    return [
        {
            "case": size,
            "who": name,
            "ms a step": 1000 * seconds[name] / NEW,
            "tokens/s": rows * NEW / seconds[name],
            "times": seconds["transformers"] / seconds[name],
            "goal": "-" if goal is None else f"{goal:g}",
            "equal ids": equal.get(name, 1.0),
            "distinct": sum(len(set(row)) for row in expected) / rows,
        }
        for name in seconds
    ]


def share_of_equal(found: list[list[int]], expected: list[list[int]]) -> float:
    """Return the share of equal ids."""
    pairs = [p for f, e in zip(found, expected, strict=True) for p in zip(f, e, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def main() -> None:
    """Print the table and write benchmarks/results/decode.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    lines = []
    for rows, dtype, goal in CASES:
        lines += case(rows, dtype, goal, False, arguments.rounds, arguments.compile)
    lines += case(8, torch.float32, None, True, arguments.rounds, False)
    table(lines)
    write("decode", {"preset": PRESET, "prompt": PROMPT, "new": NEW, "results": lines})


if __name__ == "__main__":
    main()

"""Compares many completions of different lengths with transformers' batched `generate`, on the same
weights.

256 prompts, 64 rows at a time. `uneven`: completions end after 16 to 256 tokens, drawn uniformly.
In fixed batches every row waits for the longest of its batch; in the engine the next prompt takes
the slot of a finished one. `even`: all completions have 128 tokens, and ids must be equal. Weights
are random, as in decode.py. Lengths are given, since random weights do not predict an end.

    python benchmarks/rollout.py [--rounds 3] [--prompts 256] [--rows 64]
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from common import interleave, medians, table, write
from decode import GREEDY, share_of_equal, tinsmith_model, transformers_model
from transformers import StoppingCriteria, StoppingCriteriaList

from tinsmith.infer.engine import Engine

PROMPT, SHORTEST, LONGEST, EVEN = 32, 16, 256, 128

Prompts = Sequence[list[int]]


class StopAtLengths(StoppingCriteria):
    """Stops every row at its own length."""

    def __init__(self, lengths: Sequence[int]):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return which rows have ended, (B,)."""
        return input_ids.shape[1] - PROMPT >= self.lengths


def generate_with_engine(
    engine: Engine, prompts: Prompts, lengths: Sequence[int]
) -> list[list[int]]:
    """Return completions by the engine, which gets all prompts at once."""
    pairs = zip(prompts, lengths, strict=True)
    completions: dict[int, list[int]] = {engine.add(ids, GREEDY, n): [] for ids, n in pairs}
    for event in engine.run():
        assert event.token is not None
        completions[event.request_id].append(event.token)
    return list(completions.values())


@torch.inference_mode()
def generate(model: Any, prompts: Prompts, lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Return completions by transformers, batch after batch."""
    completions = []
    for start in range(0, len(prompts), rows):
        limits = lengths[start : start + rows]
        ids = torch.tensor(prompts[start : start + rows])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max(limits),
            stopping_criteria=StoppingCriteriaList([StopAtLengths(limits)]),
        )
        answers = out[:, PROMPT:].tolist()
        completions += [output[:limit] for output, limit in zip(answers, limits, strict=True)]
    return completions


def case(name: str, lengths: list[int], goal: float, rows: int, rounds: int) -> list[dict]:
    """Return the table rows of one set of lengths, in float32."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 6400, (len(lengths), PROMPT), generator=generator).tolist()
    lm = tinsmith_model(torch.float32)
    model, engine = transformers_model(lm), Engine(lm, max_batch_size=rows)
    equal = share_of_equal(
        generate_with_engine(engine, prompts, lengths), generate(model, prompts, lengths, rows)
    )
    seconds = medians(
        interleave(
            {
                "transformers": lambda: generate(model, prompts, lengths, rows),
                "tinsmith": lambda: generate_with_engine(engine, prompts, lengths),
            },
            rounds,
            warmup=0,
        )
    )
    return [
        {
            "case": name,
            "who": who,
            "seconds": each,
            "tokens/s": sum(lengths) / each,
            "times": seconds["transformers"] / each,
            "goal": f"{goal:g}",
            "equal ids": equal,
        }
        for who, each in seconds.items()
    ]


def main() -> None:
    """Measure both cases, print a table and write benchmarks/results/rollout.json."""
    parser = argparse.ArgumentParser(
        description="Uneven and even completions by Tinsmith and transformers."
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--rows", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    uneven = torch.randint(
        SHORTEST, LONGEST + 1, (arguments.prompts,), generator=generator
    ).tolist()
    lines = case("uneven", uneven, 2.0, arguments.rows, arguments.rounds)
    lines += case("even", [EVEN] * arguments.prompts, 1.2, arguments.rows, arguments.rounds)
    table(lines)
    if (arguments.prompts, arguments.rows) == (256, 64):
        print(write("rollout", {"rounds": arguments.rounds, "lines": lines}))


if __name__ == "__main__":
    main()

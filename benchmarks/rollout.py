"""Many answers of different lengths, beside transformers' batched `generate`, on the same weights.

256 prompts, 64 rows at a time. `uneven`: answers end after 16 to 256 tokens, uniformly drawn; in
fixed batches every row waits for its batch's longest, here a finished row's place is taken by the
next prompt. `even`: all answers have 128 tokens, and ids must be equal. Weights are random, as in
decode.py; ends are given by number, since random weights do not end anything.

    python benchmarks/rollout.py [--rounds 3] [--prompts 256] [--rows 64]
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from common import interleave, medians, table, write
from decode import GREEDY, ours, share, theirs
from transformers import StoppingCriteria, StoppingCriteriaList

from tinsmith.infer.engine import Engine

PROMPT, SHORTEST, LONGEST, EVEN = 32, 16, 256, 128

Prompts = Sequence[list[int]]


class Ends(StoppingCriteria):
    """Every row ends at its own length."""

    def __init__(self, lengths: Sequence[int]):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """(B,) which rows are over."""
        return input_ids.shape[1] - PROMPT >= self.lengths


def answer(engine: Engine, prompts: Prompts, lengths: Sequence[int]) -> list[list[int]]:
    """By the engine: all prompts at once."""
    pairs = zip(prompts, lengths, strict=True)
    output: dict[int, list[int]] = {engine.add(ids, GREEDY, n): [] for ids, n in pairs}
    for event in engine.run():
        assert event.token is not None
        output[event.request_id].append(event.token)
    return list(output.values())


@torch.inference_mode()
def generate(model: Any, prompts: Prompts, lengths: Sequence[int], rows: int) -> list[list[int]]:
    """By transformers: batch after batch."""
    found = []
    for start in range(0, len(prompts), rows):
        limits = lengths[start : start + rows]
        ids = torch.tensor(prompts[start : start + rows])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max(limits),
            stopping_criteria=StoppingCriteriaList([Ends(limits)]),
        )
        answers = out[:, PROMPT:].tolist()
        found += [output[:limit] for output, limit in zip(answers, limits, strict=True)]
    return found


def case(name: str, lengths: list[int], goal: float, rows: int, rounds: int) -> list[dict]:
    """Lines of the table for one set of lengths, in float32."""
    made = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 6400, (len(lengths), PROMPT), generator=made).tolist()
    lm = ours(torch.float32)
    model, engine = theirs(lm), Engine(lm, max_batch_size=rows)
    equal = share(answer(engine, prompts, lengths), generate(model, prompts, lengths, rows))
    seconds = medians(
        interleave(
            {
                "transformers": lambda: generate(model, prompts, lengths, rows),
                "tinsmith": lambda: answer(engine, prompts, lengths),
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
    """Both cases, as a table and as JSON."""
    parser = argparse.ArgumentParser(description="Uneven and even answers beside transformers.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--rows", type=int, default=64)
    requested = parser.parse_args()
    torch.set_num_threads(2)
    made = torch.Generator().manual_seed(0)
    uneven = torch.randint(SHORTEST, LONGEST + 1, (requested.prompts,), generator=made).tolist()
    lines = case("uneven", uneven, 2.0, requested.rows, requested.rounds)
    lines += case("even", [EVEN] * requested.prompts, 1.2, requested.rows, requested.rounds)
    table(lines)
    if (requested.prompts, requested.rows) == (256, 64):
        print(write("rollout", {"rounds": requested.rounds, "lines": lines}))


if __name__ == "__main__":
    main()

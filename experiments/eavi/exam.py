"""What a model knows of tasks that no run is trained on: of rules that it has seen, and others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.eavi import cases
from tinsmith import LM, Tokenizer
from tinsmith.core.rng import derive_seed
from tinsmith.data.arc.encoding import ArcExample, encode_example
from tinsmith.data.arc.generators import generate_puzzles
from tinsmith.data.arc.grids import Puzzle
from tinsmith.data.formats.base import MaskedSamples
from tinsmith.data.loader.loader import DatasetMember, TokenizedDataset
from tinsmith.data.prepare.shards import Shards, ShardWriter
from tinsmith.evals.arc import ArcOutcome, evaluate_arc
from tinsmith.hub.load import load
from tinsmith.objectives.eavi import EAVI
from tinsmith.train.evaluate import evaluate_objective

SEED = derive_seed(0, "examination")
MAX_NEW = 2 * cases.SIZES.largest * (cases.SIZES.largest + 1)
"""Ids of an answer: twice those of the largest input."""


class Exam:
    """Two groups of tasks, the same for all models."""

    def __init__(self, folder: Path):
        counts = {"seen": (cases.RULES, cases.SEEN_TASKS), "held": (cases.HELD, cases.HELD_TASKS)}
        self.groups = {
            name: list(generate_puzzles(rules, SEED, count, cases.SIZES))
            for name, (rules, count) in counts.items()
        }
        self._sources = {
            name: _source(folder / name, puzzles) for name, puzzles in self.groups.items()
        }

    def marks(self, run: Path) -> tuple[dict[str, Any], list[ArcOutcome]]:
        """By group exact match, and nats of an answer's token after the truth's beginnings and
        after the model's own; and what it said.
        """
        lm, tokenizer = load(run)
        assert tokenizer is not None
        marks: dict[str, Any] = {}
        output: list[ArcOutcome] = []
        for name, puzzles in self.groups.items():
            found = evaluate_arc(lm, tokenizer, puzzles, batch_size=128, max_new_tokens=MAX_NEW)
            output += found.outcomes
            marks[name] = round(found.score, 6)
            marks |= {f"{key}.{name}": nats for key, nats in self._nats(lm, tokenizer, name)}
        return marks, output

    def _nats(self, lm: LM, tokenizer: Tokenizer, name: str) -> list[tuple[str, float]]:
        objective, source = EAVI().build(), self._sources[name]
        objective.prepare(lm, tokenizer)
        found = evaluate_objective(
            *(objective, lm, source),
            **{"rows": source.size, "batch_rows": 40, "device": "cpu", "poll": lambda: None},
        )
        return [(key, round(found[key], 6)) for key in ("teacher", "align", "align_equal")]


def _source(folder: Path, puzzles: Sequence[Puzzle]) -> TokenizedDataset:
    with ShardWriter(folder, 18, masked=True) as writer:
        for puzzle in puzzles:
            writer.add(*encode_example(ArcExample(puzzle, train_on_all_outputs=False)))
    shards = Shards.open(folder)
    rows = MaskedSamples(shards, cases.CONTEXT)
    member = DatasetMember("exam", 0, 1.0, rows, shards.tokens_total, shards.tokens_total)
    return TokenizedDataset([member], cases.CONTEXT, 0, "validation")

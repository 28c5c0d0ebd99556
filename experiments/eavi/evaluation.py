"""Evaluation on new tasks of training rules and on tasks of held-out rules."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

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
MAX_NEW_TOKENS = 2 * cases.SIZES.largest * (cases.SIZES.largest + 1)
"""Twice the tokens of the largest grid."""


LOSSES = {
    "teacher": "teacher_forcing_loss",
    "align": "alignment_loss",
    "align_equal": "alignment_loss_equal_shape",
}
"""Key of results.json -> metric."""


class Evaluation:
    """Two groups of tasks, the same for all models: of training rules and of held-out rules."""

    def __init__(self, folder: Path):
        counts = {"seen": (cases.RULES, cases.SEEN_TASKS), "held": (cases.HELD, cases.HELD_TASKS)}
        self.groups = {
            name: list(generate_puzzles(rules, SEED, count, cases.SIZES))
            for name, (rules, count) in counts.items()
        }
        self._sources = {
            name: _source(folder / name, puzzles) for name, puzzles in self.groups.items()
        }

    def evaluate(self, run: Path) -> tuple[dict[str, Any], list[ArcOutcome]]:
        """Return scores and outcomes. The scores are, by group, exact match and the losses in nats
        per token after true prefixes and after prefixes that the model generated.
        """
        lm, tokenizer = load(run)
        assert tokenizer is not None
        scores: dict[str, Any] = {}
        outcomes: list[ArcOutcome] = []
        for name, puzzles in self.groups.items():
            result = evaluate_arc(
                lm, tokenizer, puzzles, batch_size=128, max_new_tokens=MAX_NEW_TOKENS
            )
            outcomes += result.outcomes
            scores[name] = round(result.score, 6)
            scores |= {f"{key}.{name}": loss for key, loss in self._losses(lm, tokenizer, name)}
        return scores, outcomes

    def _losses(self, lm: LM, tokenizer: Tokenizer, name: str) -> list[tuple[str, float]]:
        objective, source = EAVI().build(), self._sources[name]
        objective.prepare(lm, tokenizer)
        metrics = evaluate_objective(
            *(objective, lm, source),
            **{"max_samples": source.size, "batch_size": 40},
            **{"device": torch.device("cpu"), "poll": lambda: None},
        )
        return [(key, round(metrics[metric], 6)) for key, metric in LOSSES.items()]


def _source(folder: Path, puzzles: Sequence[Puzzle]) -> TokenizedDataset:
    with ShardWriter(folder, 18, masked=True) as writer:
        for puzzle in puzzles:
            writer.add(*encode_example(ArcExample(puzzle, train_on_all_outputs=False)))
    shards = Shards.open(folder)
    samples = MaskedSamples(shards, cases.SEQ_LEN)
    member = DatasetMember("eval", 0, 1.0, samples, shards.tokens_total, shards.tokens_total)
    return TokenizedDataset([member], cases.SEQ_LEN, 0, "validation")

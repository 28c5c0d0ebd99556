"""What a model knows of sums that were held back, and how far it is from where it began."""

from pathlib import Path

import torch

from experiments.alignment import cases
from tinsmith import LM, Tokenizer
from tinsmith.data.loader.loader import open_dataset
from tinsmith.data.prepare.prepare import prepare
from tinsmith.data.sources import ChatsData
from tinsmith.hub.load import load
from tinsmith.losses.logprobs import kl
from tinsmith.losses.policy import log_ratio
from tinsmith.objectives.grpo import GRPO

MAX_NEW = 5
DRAWS = 4
"""Sampled answers to each sum, for the divergence."""


class Exam:
    """The held-back sums in the tokens of the model in `begun`, which answers are compared with."""

    def __init__(self, begun: Path, held: Path, folder: Path):
        self.start, self._tokenizer = _open(begun)
        data = ChatsData(path=str(held), validation=0.0)
        made = prepare(data, self._tokenizer, "prompts", folder, seq_len=cases.ROOM)
        self._source = open_dataset(made.folder, "prompts", "train", cases.ROOM, 0)
        self._objective = GRPO(max_new_tokens=MAX_NEW, generation_batch_size=256).build()

    def accuracy(self, run: Path) -> float:
        """Of greedy answers to all sums."""
        lm = self._taken_by(run)
        count = self._source.size
        return round(self._objective.evaluate(lm, self._source, count)["reward"], 6)

    def divergence(self, run: Path) -> float:
        """KL(model || start), nats of an answer: the estimator k3 of every token, on answers that
        the model in `run` sampled at temperature 1, summed over an answer, mean over answers.
        """
        lm = self._taken_by(run)
        prompts = self._source.get_prompts(0, self._source.size) * DRAWS
        with torch.no_grad():
            rollouts = self._objective.generate(lm, prompts, list(range(len(prompts))))
            rows = self._objective.collate(lm, rollouts, self._objective.score(prompts, rollouts))
            before = self._objective.logprobs(self.start, rows)[0]
        away = log_ratio(rows.old_logprobs, before, rows.mask)
        return float(kl(away, torch.zeros_like(away), "k3").sum() / len(prompts))

    def _taken_by(self, run: Path) -> LM:
        lm, _ = _open(run)
        self._objective.prepare(lm, self._tokenizer)
        return lm


def _open(folder: Path) -> tuple[LM, Tokenizer]:
    lm, tokenizer = load(folder)
    assert tokenizer is not None
    return lm, tokenizer

"""Accuracy on held-out sums, and KL divergence from the SFT model."""

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

MAX_NEW_TOKENS = 5
NUM_GENERATIONS = 4
"""Sampled completions of each sum, for the KL divergence."""


class Evaluation:
    """The held-out sums in the file `held_out`, and the SFT model in the run `sft_run`."""

    def __init__(self, sft_run: Path, held_out: Path, folder: Path):
        self._sft_model, self._tokenizer = _load(sft_run)
        data = ChatsData(path=str(held_out), validation=0.0)
        prepared = prepare(data, self._tokenizer, "prompts", folder, seq_len=cases.SEQ_LEN)
        self._source = open_dataset(prepared.folder, "prompts", "train", cases.SEQ_LEN, 0)
        self._objective = GRPO(max_new_tokens=MAX_NEW_TOKENS, generation_batch_size=256).build()

    def accuracy(self, run: Path) -> float:
        """Return the share of right greedy completions of all sums."""
        lm = self._load_policy(run)
        count = self._source.size
        return round(self._objective.evaluate(lm, self._source, count)["reward"], 6)

    def divergence(self, run: Path) -> float:
        """Return KL(model || SFT model) in nats per completion: the estimator k3 of each token, on
        completions sampled from the model in `run` at temperature 1, summed over a completion and
        averaged over completions.
        """
        lm = self._load_policy(run)
        prompts = self._source.get_prompts(0, self._source.size) * NUM_GENERATIONS
        with torch.no_grad():
            rollouts = self._objective.generate(lm, prompts, list(range(len(prompts))))
            batch = self._objective.collate(lm, rollouts, self._objective.score(prompts, rollouts))
            sft_logprobs = self._objective.logprobs(self._sft_model, batch)[0]
        ratio = log_ratio(batch.old_logprobs, sft_logprobs, batch.mask)
        return float(kl(ratio, torch.zeros_like(ratio), "k3").sum() / len(prompts))

    def _load_policy(self, run: Path) -> LM:
        lm, _ = _load(run)
        self._objective.prepare(lm, self._tokenizer)
        return lm


def _load(folder: Path) -> tuple[LM, Tokenizer]:
    lm, tokenizer = load(folder)
    assert tokenizer is not None
    return lm, tokenizer

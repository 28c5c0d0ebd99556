"""T11: GRPO raises the accuracy of answers that a calculator may be asked for.

The model it begins with is that of recipes/tiny/tools_sft.yaml, whose teacher asks in 40 of 100
conversations and guesses wrong in the others.
"""

from pathlib import Path

import pytest

from tinsmith.config import RunConfig, load
from tinsmith.data.loader.loader import open_dataset
from tinsmith.data.prepare.prepare import prepare
from tinsmith.hub.load import load as load_model
from tinsmith.objectives.rl.base import RLObjective
from tinsmith.train.trainer import train

QUESTIONS = 200


def exam(run: Path, practice: RunConfig, place: Path) -> tuple[float, float]:
    """How many of the answers that are drawn for held-back questions are right, and how many of
    them come of a call.
    """
    lm, tokenizer = load_model(run / "final")
    assert tokenizer is not None
    context = practice.train.seq_len
    made = prepare(practice.data, tokenizer, "prompts", place, print, seq_len=context)
    source = open_dataset(made.folder, "prompts", "validation", context, 0)
    objective = practice.objective.build()
    assert isinstance(objective, RLObjective)
    objective.prepare(lm, tokenizer)
    prompts = [source.get_prompts(number, 1)[0] for number in range(QUESTIONS)]
    episodes = objective.generate(lm, prompts, list(range(QUESTIONS)))
    rewards = objective.score(prompts, episodes)
    return float(rewards.mean()), sum(each.turns > 1 for each in episodes) / QUESTIONS


@pytest.mark.slow
def test_T11_grpo_learns_to_call_a_calculator_instead_of_guessing(root, tmp_path, monkeypatch):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path / "runs"))
    start = train(load(root / "recipes/tiny/tools_sft.yaml"), "start")
    practice = load(root / "recipes/tiny/tools.yaml", [f"init_from={start}"])
    right, requested = exam(start, practice, tmp_path / "exam")
    assert 0.2 <= right <= 0.6
    assert 0.3 <= requested <= 0.5
    then = exam(train(practice, "practised"), practice, tmp_path / "exam")
    assert then[0] >= right + 0.2
    assert then[1] >= 0.8

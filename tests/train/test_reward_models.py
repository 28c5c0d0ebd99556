"""A trained reward model as one of the rewards of GRPO, PPO and SPO."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tinsmith.config import from_dict
from tinsmith.core.errors import UserError
from tinsmith.core.log import read_metrics
from tinsmith.data.formats.prompts import Prompt
from tinsmith.hub.load import load
from tinsmith.objectives.grpo import GRPO
from tinsmith.objectives.rl.rollout import Rollout
from tinsmith.rewards.config import RewardModelReward
from tinsmith.train.dryrun import dry_run
from tinsmith.train.frozen import load_reward_model
from tinsmith.train.trainer import train

LAYER = {
    "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2},
    "feed_forward": {"kind": "swiglu", "hidden_dim": 48},
}
MODEL = {"vocab_size": 320, "dim": 32, "depth": 1, "max_seq_len": 64, "pattern": [LAYER]}
OPTIM = {
    "matrices": {"kind": "adamw", "lr": 2.0e-3},
    "others": {"kind": "adamw", "lr": 2.0e-3},
    "schedule": {"kind": "wsd", "warmup": 2},
}
TRAIN = {
    **{"seq_len": 64, "batch_size": 8, "precision": "fp32"},
    **{"save_every": 10_000, "eval_every": 10_000, "sample_every": 10_000},
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a file of pairs whose chosen completion is all a's, and with `runs/`."""
    folder = tmp_path_factory.mktemp("rewards")
    samples = [
        {"prompt": f"{n}?", "chosen": "a" * (1 + n % 3), "rejected": "zyxw"[: 1 + n % 4]}
        for n in range(60)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINSMITH_RUNS", str(folder / "runs"))
        yield folder


def run(workspace: Path, name: str, objective: dict[str, Any], steps: int, **more: Any) -> Path:
    data = {"kind": "chats", "path": str(workspace / "pairs.jsonl"), "validation": 0.2}
    start = {"model": MODEL, "tokenizer": {"train": {"vocab_size": 320}}}
    model_section = more or start
    recipe = model_section | {
        "data": data,
        "objective": objective,
        "optim": OPTIM,
        "log": {"every": 1},
    }
    recipe |= {"train": TRAIN | {"steps": steps}, "eval": {"max_samples": 8, "max_new_tokens": 4}}
    return train(from_dict(recipe), name)


@pytest.fixture(scope="module")
def frozen_model(workspace) -> Path:
    return run(workspace, "reward-model", {"kind": "reward"}, 30)


def rl_objective(kind: str, *rewards: dict[str, Any], **objective: Any) -> dict[str, Any]:
    return {"kind": kind, "max_new_tokens": 6, "rewards": list(rewards)} | objective


@pytest.mark.parametrize("kind", ["grpo", "ppo", "spo"])
def test_a_policy_trains_on_a_reward_model_that_does_not_change(kind, workspace, frozen_model):
    before = {file.name: file.read_bytes() for file in (frozen_model / "final").iterdir()}
    rewards = (
        {"kind": "reward_model", "path": str(frozen_model)},
        {"kind": "distinct_ngrams", "weight": 0.1},
    )
    folder = run(workspace, kind, rl_objective(kind, *rewards), 2, init_from=str(frozen_model))
    records = list(read_metrics(folder / "metrics.jsonl"))
    steps = [record for record in records if record["kind"] == "train"]
    assert len(steps) == 2
    assert all(record["reward_failed_fraction"] == 0 for record in steps)
    assert all(abs(record["reward"]) > 0 for record in steps)
    assert before == {file.name: file.read_bytes() for file in (frozen_model / "final").iterdir()}


def test_T11_the_reward_model_score_of_completions_rises(workspace, frozen_model):
    objective = rl_objective(
        "grpo",
        {"kind": "reward_model", "path": str(frozen_model)},
        num_generations=8,
        generation_batch_size=128,
    )
    folder = run(workspace, "grpo-higher-reward", objective, 40, init_from=str(frozen_model))
    records = [
        record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "train"
    ]
    rewards = [record["reward"] for record in records]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15


def test_the_reward_is_the_weighted_score_of_prompt_and_completion_without_gradients(frozen_model):
    lm, tokenizer = load(frozen_model)
    assert tokenizer is not None
    model = load_reward_model(str(frozen_model), tokenizer, CPU)
    objective = GRPO(
        rewards=(RewardModelReward(path=str(frozen_model), weight=2.0),), num_generations=2
    ).build()
    objective.reward_models = {str(frozen_model): model}
    objective.prepare(lm, tokenizer)
    episodes = [Rollout([20, 21, 22][: 1 + n % 3], seed=n) for n in range(5)]
    for length, episode in enumerate(episodes):
        for token in range(30, 31 + length):
            episode.append_token(token, 0.0)
    prompts = [Prompt(episode.ids, 0, None, {}) for episode in episodes]
    one_at_a_time = [2 * float(model.score([episode.ids])) for episode in episodes]
    assert objective.raw_rewards(prompts, episodes) == pytest.approx(one_at_a_time, abs=1e-5)
    model.batch_size = 2
    assert objective.raw_rewards(prompts, episodes) == pytest.approx(one_at_a_time, abs=1e-5)
    assert len(set(one_at_a_time)) == 5
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not dict(objective.named_parameters())


def test_a_folder_that_is_no_reward_model_of_this_vocabulary_is_refused_in_one_line(
    workspace, frozen_model
):
    plain = run(workspace, "plain", {"kind": "dpo"}, 1)
    other = {"model": MODEL | {"vocab_size": 274}, "tokenizer": {"train": {"vocab_size": 274}}}
    other_vocabulary = run(workspace, "foreign", {"kind": "reward"}, 1, **other)
    for folder, message in (
        (str(plain), "no reward model; train one with objective: {kind: reward}"),
        (str(other_vocabulary), "objective.rewards: .*gives other ids"),
        (str(workspace / "nowhere"), "nowhere: no such folder"),
    ):
        objective = rl_objective("grpo", {"kind": "reward_model", "path": folder})
        with pytest.raises(UserError, match=message) as error:
            run(workspace, "refused", objective, 1, init_from=str(frozen_model))
        assert "\n" not in str(error.value)


def test_a_dry_run_needs_no_reward_model(capsys):
    objective = rl_objective("grpo", {"kind": "reward_model", "path": "runs/to-be-trained"})
    start = {"model": MODEL, "tokenizer": {"train": {"vocab_size": 320}}}
    data = {"kind": "tasks", "tasks": ["arithmetic"], "count": 100}
    recipe = start | {"data": data, "objective": objective, "train": TRAIN | {"steps": 1}}
    dry_run(from_dict(recipe), "dry")
    assert "one step of" in capsys.readouterr().out

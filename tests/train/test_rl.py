"""GRPO, PPO and SPO as dry runs and whole runs, and recipes of them that are refused."""

import json

import pytest
import torch

from tinsmith.config import from_dict
from tinsmith.core.errors import UserError
from tinsmith.core.log import read_metrics
from tinsmith.train import checkpoint
from tinsmith.train.dryrun import dry_run
from tinsmith.train.trainer import train

KINDS = ("grpo", "ppo", "spo")
RECIPE = {
    "model": {
        "vocab_size": 320,
        "dim": 32,
        "depth": 1,
        "max_seq_len": 64,
        "pattern": [
            {
                "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2},
                "feed_forward": {"kind": "swiglu", "hidden_dim": 48},
            }
        ],
    },
    "tokenizer": {"train": {"vocab_size": 320}},
    "data": {"kind": "tasks", "tasks": ["arithmetic"], "count": 100, "digits": 1},
    "train": {
        **{"steps": 2, "seq_len": 64, "batch_size": 4, "precision": "bf16"},
        **{"save_every": 2, "eval_every": 1, "sample_every": 2},
    },
    "eval": {"max_samples": 3, "max_new_tokens": 4},
    "log": {"every": 1},
}


def recipe(kind: str, **objective):
    section = {
        "kind": kind,
        "max_new_tokens": 6,
        "rewards": [{"kind": "distinct_ngrams"}],
    } | objective
    return from_dict(RECIPE | {"objective": section})


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path / "runs"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_runs_a_step(kind, capsys):
    dry_run(recipe(kind, kl_coef=0.1), "dry")
    assert "one step of" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_the_reward_of_greedy_completions_of_held_out_prompts(kind):
    folder = train(recipe(kind, kl_coef=0.1), kind)
    records = list(read_metrics(folder / "metrics.jsonl"))
    evals = [record for record in records if record["kind"] == "eval"]
    assert [record["step"] for record in evals] == [1, 2]
    assert all(0 <= record["reward"] <= 1 and record["completion_length"] <= 6 for record in evals)
    steps = [record for record in records if record["kind"] == "train"]
    assert {
        "reward",
        "reward_std",
        "completion_length",
        "clip_fraction",
        "approx_kl",
        "kl",
    } <= steps[0].keys()
    assert "reward of greedy answers" in (folder / "final" / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_T2_adapters_resume_to_the_same_bits_in_the_middle_of_a_rollout(kind):
    """The reference is the policy without adapters. One rollout feeds several optimizer steps."""
    section = {
        "kind": kind,
        "max_new_tokens": 6,
        "kl_coef": 0.1,
        "num_minibatches": 2,
        "num_epochs": 2,
    }
    section |= {"rewards": [{"kind": "distinct_ngrams"}, {"kind": "length", "low": 4, "high": 9}]}
    lora = {"targets": ["mixer.q_proj", "feed.*"], "rank": 2}
    steps = {"steps": 6, "precision": "fp32", "save_every": 3, "eval_every": 6, "sample_every": 6}
    data = RECIPE | {"objective": section, "lora": lora, "train": RECIPE["train"] | steps}
    whole = train(from_dict(data), "whole")
    middle = whole / "checkpoints" / "step-00000003"
    resumed = train(from_dict(data), "resumed", resume_from=middle)
    last = "checkpoints/step-00000006"
    files = sorted((whole / last).glob("*.safetensors"))
    assert len(files) >= 3, "weights, optimizer state, random state"
    for file in files:
        assert file.read_bytes() == (resumed / last / file.name).read_bytes(), file.name
    rewards = [
        [
            record["reward"]
            for record in read_metrics(folder / "metrics.jsonl")
            if record["kind"] == "train"
        ]
        for folder in (whole, resumed)
    ]
    assert rewards[0][3:] == rewards[1][-3:]


@pytest.mark.parametrize("kind", KINDS)
def test_T2_the_first_ratio_is_1_for_a_model_with_dropout_and_router_noise(kind, noisy):
    """Completions are generated in eval mode; the step computes log-probabilities in train mode."""
    section = {"kind": kind, "max_new_tokens": 6, "rewards": [{"kind": "distinct_ngrams"}]}
    lora = {"targets": "mixer.q_proj", "rank": 2, "dropout": 0.3}
    steps = {"steps": 2, "precision": "fp32", "save_every": 1}
    data = RECIPE | {"model": noisy, "objective": section, "lora": lora}
    data |= {"train": RECIPE["train"] | steps}
    folder = train(from_dict(data), kind)
    records = list(read_metrics(folder / "metrics.jsonl"))
    steps = [record for record in records if record["kind"] == "train"]
    assert len(steps) == 2
    for record in steps:
        assert record["approx_kl"] < 1e-10
        assert record["clip_fraction"] == 0
    resumed = train(
        from_dict(data), "resumed", resume_from=folder / "checkpoints" / "step-00000001"
    )
    last = "checkpoints/step-00000002"
    for file in sorted((folder / last).glob("*.safetensors")):
        assert file.read_bytes() == (resumed / last / file.name).read_bytes(), file.name


def test_ppo_skips_steps_whose_kl_exceeds_target_kl():
    """The second epoch over the first rollout is skipped, and the next rollout trains again."""
    objective = {
        "kind": "ppo",
        "max_new_tokens": 6,
        "rewards": [{"kind": "distinct_ngrams"}],
        "num_epochs": 2,
    }
    section = {**RECIPE["train"], "precision": "fp32", "steps": 3, "save_every": 1}
    limited = objective | {"target_kl": 1e-9}
    folder = train(from_dict(RECIPE | {"objective": limited, "train": section}), "early")
    first, second, third = (
        checkpoint.load(folder / "checkpoints" / f"step-{step:08d}") for step in (1, 2, 3)
    )
    for part in ("model", "optim", "objective"):
        one, two = getattr(first, part), getattr(second, part)
        assert all(torch.equal(one[name], two[name]) for name in one), part
    assert any(not torch.equal(second.model[name], third.model[name]) for name in first.model)


def test_fsdp_is_refused():
    with pytest.raises(UserError, match=r"parallel\.kind=fsdp: this objective"):
        from_dict(RECIPE | {"objective": {"kind": "grpo"}, "parallel": {"kind": "fsdp"}})


def test_unknown_rewards_and_tools_are_refused_by_name():
    with pytest.raises(UserError, match=r"objective.grpo.rewards.0|objective.rewards.0"):
        recipe("grpo", rewards=[{"kind": "exactly"}])
    with pytest.raises(UserError, match="tools"):
        recipe("grpo", tools=["shell"])


@pytest.mark.parametrize("kind", KINDS)
def test_T18_an_exact_reward_on_prompts_without_answers_is_refused(kind, tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Say {number}.", "topic": "x"} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"kind": "chats", "path": str(path)}
    config = from_dict(RECIPE | {"data": data, "objective": {"kind": kind}})
    with pytest.raises(UserError, match="exact_match needs answers, and none of the first 3") as e:
        train(config, "run")
    assert "(fields: prompt, topic)" in str(e.value)
    assert not (tmp_path / "runs" / "run").exists()

"""DPO and reward-model training as whole runs: learning, resume, exported folders."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from tinsmith.config import from_dict
from tinsmith.core.errors import UserError
from tinsmith.core.log import read_metrics
from tinsmith.core.rng import make_generator
from tinsmith.hub.load import load
from tinsmith.text.chat import encode_chat, parse_conversation
from tinsmith.train.dryrun import dry_run
from tinsmith.train.frozen import load_reward_model
from tinsmith.train.plan import resolve
from tinsmith.train.trainer import train
from tinsmith.verbs.evaluate import EvalOptions, evaluate

KIND = ["Gladly.", "Here you are.", "Of course.", "With pleasure."]
RUDE = ["Go away.", "No way.", "Stop that.", "I will not."]
CPU = torch.device("cpu")
OBJECTIVE = {"objective": {"kind": "dpo"}}


@pytest.fixture
def pairs(tmp_path):
    """A file of 400 preference pairs: kind completions are chosen, rude ones rejected."""
    generator = make_generator(0, "pairs")

    def pick(items):
        return items[int(torch.randint(len(items), (), generator=generator))]

    things = ["tea", "bread", "the map", "a pen", "some milk", "the key", "a coat", "my hat"]
    verbs = ["Bring", "Give", "Show", "Find", "Send", "Hand"]
    samples = [
        {
            "prompt": f"{pick(verbs)} me {pick(things)}.",
            "chosen": f"{pick(KIND)} {pick(things).capitalize()}.",
            "rejected": f"{pick(RUDE)} {pick(things).capitalize()}.",
        }
        for _ in range(400)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


@pytest.fixture
def recipe(pairs):
    layer = {
        "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2},
        "feed_forward": {"kind": "swiglu", "hidden_dim": 48},
    }
    return {
        "model": {
            **{"vocab_size": 384, "dim": 32, "depth": 2, "max_seq_len": 64, "pattern": [layer]},
            "dropout": {"residual": 0.1},
        },
        "tokenizer": {"train": {"vocab_size": 384}},
        "data": {"kind": "chats", "path": str(pairs), "validation": 0.2},
        "optim": {
            "matrices": {"kind": "adamw", "lr": 2.0e-3},
            "others": {"kind": "adamw", "lr": 2.0e-3},
            "schedule": {"kind": "wsd", "warmup": 2},
        },
        "train": {
            **{
                "steps": 6,
                "seq_len": 64,
                "batch_size": 4,
                "grad_accum_steps": 2,
                "precision": "fp32",
            },
            **{"save_every": 2, "eval_every": 3, "sample_every": 6},
        },
        "eval": {"max_samples": 64, "max_new_tokens": 4},
        "log": {"every": 1},
    }


@pytest.fixture
def run(tmp_path, monkeypatch, recipe):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path / "runs"))

    def train_objective(name, objective, resume_from=None, **settings):
        model = {**recipe["model"], "dropout": {}} if settings.pop("plain", False) else {}
        data = recipe | {"objective": objective, "train": {**recipe["train"], **settings}}
        data |= {"model": model} if model else {}
        return train(from_dict(data), name, resume_from=resume_from)

    return train_objective


def records(folder, kind):
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == kind]


def without_timings(metrics):
    timings = ("tokens_per_second", "eta_seconds")
    return [{k: v for k, v in record.items() if k not in timings} for record in metrics]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "simpo", "orpo", "kto"])
def test_T11_every_dpo_loss_raises_margin_and_accuracy(loss, run):
    objective = {"kind": "dpo", "loss": loss}
    folder = run(loss, objective, steps=40, eval_every=40, save_every=40, plain=True)
    before, after = records(folder, "train")[0], records(folder, "eval")[-1]
    assert after["accuracy"] >= 0.9
    assert after["margin"] > before["margin"] + 0.02
    assert after["loss"] < before["loss"]


def test_T11_dpo_starts_at_ln_2_and_ends_within_expected_bounds(run):
    folder = run("band", {"kind": "dpo"}, steps=40, eval_every=40, save_every=40, plain=True)
    first, last = records(folder, "train")[0], records(folder, "eval")[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["margin"] == first["accuracy"] == 0
    assert last["accuracy"] == 1.0
    assert 0.5 < last["margin"] < 6.0
    assert last["loss"] < 0.45


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_a_policy_with_dropout_and_router_noise_equals_its_reference_at_the_first_step(
    loss, run, recipe, noisy
):
    """Dropout of model and adapters, router noise and load-balancing losses are off."""
    recipe["model"] = noisy | {"vocab_size": 384}
    recipe["lora"] = {"targets": "mixer.q_proj", "rank": 2, "dropout": 0.3}
    folder = run(loss, {"kind": "dpo", "loss": loss}, steps=2)
    first = records(folder, "train")[0]
    assert first["margin"] == first["accuracy"] == 0
    assert first["loss"] == pytest.approx(math.log(2) if loss == "sigmoid" else 1.0, abs=1e-7)
    assert first.get("balance", 0) == 0
    lm, _ = load(folder)
    assert lm.config.dropout.residual == lm.config.layers[0].feed_forward.noise == 0


def test_dropout_that_dpo_switched_off_can_be_switched_on_in_the_next_run(run, recipe, noisy):
    """`model` may repeat the section of `init_from`, whose run trained without dropout."""
    with_dropout = {**recipe["model"], "pattern": noisy["pattern"]}
    recipe["model"] = with_dropout
    folder = run("still", {"kind": "dpo"}, steps=1)
    del recipe["tokenizer"]  # that of `init_from` is used
    again = from_dict(recipe | {"objective": {"kind": "reward"}, "init_from": str(folder)})
    assert again.model is not None
    model_config = resolve(again).model_config
    assert model_config == again.model
    assert model_config.dropout.residual == 0.1
    assert model_config.layers[0].feed_forward.noise == 0.5
    other = from_dict(
        recipe | {"model": with_dropout | {"dim": 64}, "init_from": str(folder)} | OBJECTIVE
    )
    with pytest.raises(UserError, match="model: differs from that of init_from"):
        resolve(other)


def test_T11_a_reward_model_ranks_held_out_pairs(run):
    folder = run("band", {"kind": "reward"}, steps=40, eval_every=40, save_every=40, plain=True)
    first, last = records(folder, "train")[0], records(folder, "eval")[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert last["accuracy"] >= 0.95
    assert last["loss"] < 0.35


@pytest.mark.parametrize(
    "objective",
    [{"kind": "dpo"}, {"kind": "dpo", "loss": "kto"}, {"kind": "reward"}],
    ids=lambda objective: objective.get("loss", objective["kind"]),
)
def test_T2_resume_is_bit_exact(objective, run):
    """With dropout, evaluation and samples; the reference is loaded again on resume."""
    whole = run("whole", objective)
    middle = whole / "checkpoints" / "step-00000004"
    resumed = run("resumed", objective, resume_from=middle)
    for name in ("model", "optim", "objective", "rng-00000"):
        files = [
            f / "checkpoints" / "step-00000006" / f"{name}.safetensors" for f in (whole, resumed)
        ]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    for kind in ("train", "eval", "samples"):
        expected = [
            record for record in without_timings(records(whole, kind)) if record["step"] > 4
        ]
        assert without_timings(records(resumed, kind)) == expected


def test_T2_after_a_resume_the_reference_is_the_policy_before_the_first_step(run):
    """Otherwise the first loss of the resumed run would be exactly ln 2 again."""
    whole = run("whole", {"kind": "dpo"}, plain=True)
    resumed = run(
        "resumed",
        {"kind": "dpo"},
        resume_from=whole / "checkpoints" / "step-00000004",
        plain=True,
    )
    assert records(resumed, "train")[0]["loss"] != pytest.approx(math.log(2), abs=1e-4)


def test_a_finished_run_loads_and_its_card_names_the_evaluation(run):
    folder = run("done", {"kind": "dpo"})
    lm, tokenizer = load(folder)
    assert tokenizer is not None
    assert lm.config.vocab_size == 384
    card = (folder / "final" / "README.md").read_text(encoding="utf-8")
    assert "pairs ranked right" in card
    assert not (folder / "final" / "objective.safetensors").exists()
    with pytest.raises(UserError, match="was trained on pairs; name a text with --data"):
        evaluate(str(folder), "bpb", EvalOptions(None, None, None), "cpu", None, True)
    assert records(folder, "samples")[-1]["samples"][0]["prompt"].endswith(
        "<|im_start|>assistant\n"
    )


def test_a_trained_reward_model_is_loaded_as_a_reward(run):
    folder = run(
        "reward-model", {"kind": "reward"}, steps=40, eval_every=40, save_every=40, plain=True
    )
    _, tokenizer = load(folder)
    reward_models = [
        load_reward_model(str(path), tokenizer, CPU) for path in (folder, folder / "final")
    ]
    prompt = {"role": "user", "content": "Give me tea."}
    ids = [
        encode_chat(
            tokenizer,
            parse_conversation(
                {"messages": [prompt, {"role": "assistant", "content": completion}]}
            ),
        ).ids[:-1]
        for completion in ("Gladly. Tea.", "Go away. Tea.")
    ]
    assert ids[0][-1] == tokenizer.end_of_turn
    scores = [reward_model.score(ids) for reward_model in reward_models]
    assert torch.equal(*scores)
    assert scores[0][0] > scores[0][1] + 0.5
    newest = folder / "checkpoints" / "step-00000040"
    assert load_file(newest / "objective.safetensors")["head.weight"].shape == (1, 32)
    assert torch.equal(load_reward_model(str(newest), tokenizer, CPU).score(ids), scores[0])


def test_a_dpo_run_is_refused_as_a_reward_model(run):
    folder = run("plain", {"kind": "dpo"}, steps=1)
    _, tokenizer = load(folder)
    with pytest.raises(UserError, match="no reward model; train one"):
        load_reward_model(str(folder), tokenizer, CPU)


@pytest.mark.parametrize("objective", [{"kind": "dpo"}, {"kind": "reward"}])
def test_a_dry_run_runs_a_step_on_pairs(objective, recipe, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path / "none"))
    model = {**recipe["model"], "dropout": {}}
    dry_run(from_dict(recipe | {"objective": objective, "model": model}), "x")
    assert "loss 0.693" in capsys.readouterr().out


def test_a_dry_run_of_dpo_has_no_dropout(recipe, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path / "none"))
    dry_run(from_dict(recipe | OBJECTIVE), "x")
    assert "loss 0.693" in capsys.readouterr().out

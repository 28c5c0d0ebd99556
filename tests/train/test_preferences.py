"""DPO and the reward model as whole runs: what they move, resume, leave behind."""

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
    """Answers that are kind and answers that are rude, about many things."""
    draw = make_generator(0, "pairs")

    def pick(items):
        return items[int(torch.randint(len(items), (), generator=draw))]

    things = ["tea", "bread", "the map", "a pen", "some milk", "the key", "a coat", "my hat"]
    verbs = ["Bring", "Give", "Show", "Find", "Send", "Hand"]
    rows = [
        {
            "prompt": f"{pick(verbs)} me {pick(things)}.",
            "chosen": f"{pick(KIND)} {pick(things).capitalize()}.",
            "rejected": f"{pick(RUDE)} {pick(things).capitalize()}.",
        }
        for _ in range(400)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
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

    def go(name, objective, resume_from=None, **settings):
        model = {**recipe["model"], "dropout": {}} if settings.pop("plain", False) else {}
        data = recipe | {"objective": objective, "train": {**recipe["train"], **settings}}
        data |= {"model": model} if model else {}
        return train(from_dict(data), name, resume_from=resume_from)

    return go


def rows(folder, kind):
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == kind]


def timeless(found):
    return [
        {k: v for k, v in row.items() if k not in ("tokens_per_second", "eta_seconds")}
        for row in found
    ]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "simpo", "orpo", "kto"])
def test_T11_the_dpo_family_moves_margin_and_accuracy(loss, run):
    objective = {"kind": "dpo", "loss": loss}
    folder = run(loss, objective, steps=40, eval_every=40, save_every=40, plain=True)
    before, after = rows(folder, "train")[0], rows(folder, "eval")[-1]
    assert after["accuracy"] >= 0.9
    assert after["margin"] > before["margin"] + 0.02
    assert after["loss"] < before["loss"]


def test_T11_dpo_starts_at_ln_2_and_ends_in_its_band(run):
    folder = run("band", {"kind": "dpo"}, steps=40, eval_every=40, save_every=40, plain=True)
    first, last = rows(folder, "train")[0], rows(folder, "eval")[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["margin"] == first["accuracy"] == 0
    assert last["accuracy"] == 1.0
    assert 0.5 < last["margin"] < 6.0
    assert last["loss"] < 0.45


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_a_policy_that_could_drop_and_be_noisy_is_its_reference_at_the_first_step(
    loss, run, recipe, noisy
):
    """Dropout of model and adapters, and a noisy router, whose losses and statistics stay."""
    recipe["model"] = noisy | {"vocab_size": 384}
    recipe["lora"] = {"targets": "mixer.q_proj", "rank": 2, "dropout": 0.3}
    folder = run(loss, {"kind": "dpo", "loss": loss}, steps=2)
    first = rows(folder, "train")[0]
    assert first["margin"] == first["accuracy"] == 0
    assert first["loss"] == pytest.approx(math.log(2) if loss == "sigmoid" else 1.0, abs=1e-7)
    assert first["balance"] > 0, "the router still has its loss"
    lm, _ = load(folder)
    assert lm.config.dropout.residual == lm.config.layers[0].feed_forward.noise == 0


def test_a_model_that_was_still_may_have_dropout_again(run, recipe, noisy):
    """`model` may repeat the one of `init_from`, whose last run had no use for dropout."""
    reported = {**recipe["model"], "pattern": noisy["pattern"]}
    recipe["model"] = reported
    folder = run("still", {"kind": "dpo"}, steps=1)
    del recipe["tokenizer"]  # that of `init_from` is used
    again = from_dict(recipe | {"objective": {"kind": "reward"}, "init_from": str(folder)})
    assert again.model is not None
    found = resolve(again).model_config
    assert found == again.model
    assert found.dropout.residual == 0.1
    assert found.layers[0].feed_forward.noise == 0.5
    other = from_dict(
        recipe | {"model": reported | {"dim": 64}, "init_from": str(folder)} | OBJECTIVE
    )
    with pytest.raises(UserError, match="model: differs from that of init_from"):
        resolve(other)


def test_T11_a_reward_model_ranks_held_back_pairs(run):
    folder = run("band", {"kind": "reward"}, steps=40, eval_every=40, save_every=40, plain=True)
    first, last = rows(folder, "train")[0], rows(folder, "eval")[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert last["accuracy"] >= 0.95
    assert last["loss"] < 0.35


@pytest.mark.parametrize(
    "objective",
    [{"kind": "dpo"}, {"kind": "dpo", "loss": "kto"}, {"kind": "reward"}],
    ids=lambda objective: objective.get("loss", objective["kind"]),
)
def test_T2_resume_is_bit_exact(objective, run):
    """With dropout, evaluation and samples in between; the reference is made anew."""
    whole = run("whole", objective)
    begun = whole / "checkpoints" / "step-00000004"
    resumed = run("resumed", objective, resume_from=begun)
    for name in ("model", "optim", "objective", "rng-00000"):
        files = [
            f / "checkpoints" / "step-00000006" / f"{name}.safetensors" for f in (whole, resumed)
        ]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    for kind in ("train", "eval", "samples"):
        expected = [row for row in timeless(rows(whole, kind)) if row["step"] > 4]
        assert timeless(rows(resumed, kind)) == expected


def test_T2_the_reference_is_the_policy_before_the_first_step_also_after_a_resume(run):
    """Otherwise a resumed run would pay exactly ln 2 again."""
    whole = run("whole", {"kind": "dpo"}, plain=True)
    resumed = run(
        "resumed",
        {"kind": "dpo"},
        resume_from=whole / "checkpoints" / "step-00000004",
        plain=True,
    )
    assert rows(resumed, "train")[0]["loss"] != pytest.approx(math.log(2), abs=1e-4)


def test_a_finished_run_opens_and_its_card_says_what_was_measured(run):
    folder = run("done", {"kind": "dpo"})
    lm, tokenizer = load(folder)
    assert tokenizer is not None
    assert lm.config.vocab_size == 384
    card = (folder / "final" / "README.md").read_text(encoding="utf-8")
    assert "pairs ranked right" in card
    assert not (folder / "final" / "objective.safetensors").exists()
    with pytest.raises(UserError, match="was trained on pairs; name a text with --data"):
        evaluate(str(folder), "bpb", EvalOptions(None, None, None), "cpu", None, True)
    assert rows(folder, "samples")[-1]["samples"][0]["prompt"].endswith("<|im_start|>assistant\n")


def test_a_trained_reward_model_is_loaded_as_a_reward(run):
    folder = run("judge", {"kind": "reward"}, steps=40, eval_every=40, save_every=40, plain=True)
    _, tokenizer = load(folder)
    found = [load_reward_model(str(place), tokenizer, CPU) for place in (folder, folder / "final")]
    requested = {"role": "user", "content": "Give me tea."}
    ids = [
        encode_chat(
            tokenizer,
            parse_conversation({"messages": [requested, {"role": "assistant", "content": output}]}),
        ).ids[:-1]
        for output in ("Gladly. Tea.", "Go away. Tea.")
    ]
    assert ids[0][-1] == tokenizer.end_of_turn
    scores = [one.score(ids) for one in found]
    assert torch.equal(*scores)
    assert scores[0][0] > scores[0][1] + 0.5
    newest = folder / "checkpoints" / "step-00000040"
    assert load_file(newest / "objective.safetensors")["head.weight"].shape == (1, 32)
    assert torch.equal(load_reward_model(str(newest), tokenizer, CPU).score(ids), scores[0])


def test_a_run_without_a_head_is_no_reward_model(run):
    folder = run("plain", {"kind": "dpo"}, steps=1)
    _, tokenizer = load(folder)
    with pytest.raises(UserError, match="no reward model; train one"):
        load_reward_model(str(folder), tokenizer, CPU)


@pytest.mark.parametrize("objective", [{"kind": "dpo"}, {"kind": "reward"}])
def test_a_dry_run_tries_a_step_of_a_pair(objective, recipe, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path / "none"))
    model = {**recipe["model"], "dropout": {}}
    dry_run(from_dict(recipe | {"objective": objective, "model": model}), "x")
    assert "loss 0.693" in capsys.readouterr().out


def test_a_dry_run_of_dpo_has_no_dropout_either(recipe, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path / "none"))
    dry_run(from_dict(recipe | OBJECTIVE), "x")
    assert "loss 0.693" in capsys.readouterr().out

"""Recipes: precedence, round trips, one-line errors."""

import pytest
import yaml

from tinsmith.config import check_schema, dump, from_dict, load, merge, set_key
from tinsmith.core.errors import UserError
from tinsmith.core.parse import read_count, to_plain

BASE = {
    "model": {"preset": "minimind2-26m"},
    "tokenizer": {"train": {"vocab_size": 6400}},
    "data": {"kind": "stdlib"},
    "objective": {"kind": "pretrain"},
}


def test_defaults_are_those_of_the_house():
    config = from_dict(BASE)
    assert (config.optim.matrices.kind, config.optim.matrices.lr) == ("muon", 0.02)
    assert (config.optim.others.kind, config.optim.others.lr) == ("adamw", 3e-3)
    assert config.optim.schedule.kind == "wsd"
    assert config.optim.max_grad_norm == 1.0
    assert config.train.keep.last == 3
    assert config.train.keep.best
    assert config.parallel.kind == "none"


def test_dump_and_load_are_inverse(tmp_path):
    config = from_dict(BASE)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(path) == config


def test_precedence_recipe_more_command_line(tmp_path):
    recipe, more = tmp_path / "a.yaml", tmp_path / "b.yaml"
    recipe.write_text(yaml.safe_dump(BASE | {"train": {"steps": 1, "batch_size": 2, "seed": 3}}))
    more.write_text(yaml.safe_dump({"train": {"batch_size": 20, "seed": 30}}))
    train = load(recipe, ["train.seed=300"], [more]).train
    assert (train.steps, train.batch_size, train.seed) == (1, 20, 300)


def test_preset_keys_can_be_overridden_and_show_up_resolved():
    config = from_dict(BASE | {"model": {"preset": "minimind2-26m", "depth": 3}})
    assert config.model is not None
    assert (config.model.depth, config.model.dim) == (3, 512)
    assert "preset" not in to_plain(config)["model"]


def test_without_a_tokenizer_one_of_the_models_vocabulary_is_trained():
    config = from_dict({key: value for key, value in BASE.items() if key != "tokenizer"})
    assert config == from_dict(BASE)
    other = from_dict(BASE | {"init_from": "runs/x", "model": None, "tokenizer": None})
    assert other.tokenizer is None


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("optim.matrices.lr=0.005", "optim.matrices", {"kind": "muon", "lr": 0.005}),
        ("optim.schedule.warmup=7", "optim.schedule", {"kind": "wsd", "warmup": 7}),
        ("objective.loss.clip_low=0.1", "objective.loss", {"kind": "grpo", "clip_low": 0.1}),
        ("model.residual.kind=plain", "model.residual", {"kind": "plain"}),
    ],
)
def test_N5_a_key_of_a_default_can_be_overridden_without_its_kind(
    tmp_path, override, key, expected
):
    path = tmp_path / "recipe.yaml"
    objective = {"kind": "grpo"} if "objective" in override else BASE["objective"]
    path.write_text(yaml.safe_dump(BASE | {"objective": objective}), encoding="utf-8")
    section = to_plain(load(path, [override]))
    for name in key.split("."):
        section = section[name]
    assert section.items() >= expected.items()


def test_N5_keys_of_another_kind_need_the_kind():
    with pytest.raises(UserError, match=r"optim\.schedule: needs a `kind` \(known: wsd, cosine"):
        from_dict(BASE | {"optim": {"schedule": {"warmup": 5, "cycles": 2}}})
    with pytest.raises(UserError, match=r"model\.residual: needs a `kind`"):
        from_dict(BASE | {"model": BASE["model"] | {"residual": {"streams": 4}}})


@pytest.mark.parametrize(
    ("objective", "lora", "lr"),
    [
        ("pretrain", None, 2e-5),
        ("sft", None, 2e-5),
        ("sft", {"rank": 8}, 2e-4),
        ("reward", None, 2e-5),
        ("dpo", None, 1e-6),
        ("dpo", {"rank": 8}, 1e-5),
        ("grpo", None, 1e-6),
        ("ppo", {"rank": 8}, 1e-5),
    ],
)
def test_N2_a_trained_model_has_the_optimizer_defaults_of_fine_tuning(objective, lora, lr):
    section = {"init_from": "runs/x", "model": None, "tokenizer": None, "lora": lora}
    optim = from_dict(BASE | section | {"objective": {"kind": objective}}).optim
    assert (optim.matrices.kind, optim.others.kind, optim.schedule.kind) == (
        *("adamw", "adamw", "cosine"),
    )
    assert optim.matrices.lr == optim.others.lr == pytest.approx(lr)
    assert optim.others.weight_decay == 0


def test_N2_given_keys_of_optim_are_kept_and_the_rest_is_filled():
    tuned = BASE | {"init_from": "runs/x", "model": None, "tokenizer": None}
    optim = from_dict(tuned | {"optim": {"matrices": {"lr": 1e-4}, "max_grad_norm": 0.5}}).optim
    assert (optim.matrices.kind, optim.matrices.lr, optim.max_grad_norm) == ("adamw", 1e-4, 0.5)
    assert optim.others.lr == 2e-5
    muon = {"matrices": {"kind": "muon"}, "schedule": {"kind": "wsd", "warmup": 3}}
    optim = from_dict(tuned | {"optim": muon}).optim
    assert (optim.matrices.kind, optim.matrices.lr) == ("muon", 0.02)
    assert (optim.schedule.kind, optim.schedule.warmup) == ("wsd", 3)


def test_N2_a_written_recipe_reads_back_equal_and_training_from_scratch_is_unchanged(tmp_path):
    config = from_dict(BASE | {"init_from": "runs/x", "model": None, "tokenizer": None})
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(path) == config
    assert from_dict(BASE).optim.matrices.kind == "muon"


def test_override_reaches_into_lists():
    data = {"model": {"pattern": [{"mixer": {"kind": "gqa"}}]}}
    set_key(data, "model.pattern.0.mixer.heads=4")
    assert data["model"]["pattern"][0]["mixer"]["heads"] == 4
    with pytest.raises(UserError, match="not an index"):
        set_key(data, "model.pattern.1.mixer.heads=4")
    with pytest.raises(UserError, match="inside a plain value"):
        set_key(data, "model.pattern.0.mixer.kind.x.y=4")


@pytest.mark.parametrize(
    ("text", "number"),
    [("20k", 20_000), ("1e6", 1_000_000), ("1_000", 1000), ("2.5k", 2500), (1e3, 1000), (7, 7)],
)
def test_counts_are_read_as_people_write_them(text, number):
    assert read_count(text) == number
    assert from_dict(BASE | {"train": {"steps": text}}).train.steps == number


@pytest.mark.parametrize("value", ["many", "1.5", -1, 2.5, None, [1]])
def test_counts_that_are_none_are_refused(value):
    with pytest.raises(UserError, match=r"^r: train(\.steps)?: ") as caught:
        from_dict(BASE | {"train": {"steps": value}}, "r")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optim": {"matrices": {"kind": "muon", "lrr": 1}}}, "optim.matrices.lrr: unknown key"),
        ({"modle": 1}, "modle: unknown key. Did you mean 'model'?"),
        ({"objective": {"kind": "sftt"}}, "'sftt' is not one of pretrain, sft"),
        ({"data": {"kind": "text", "path": "x", "feld": "y"}}, "data.feld: unknown key"),
        ({"data": [{"kind": "stdlib"}, {"kind": "x"}]}, "data.1.kind: 'x' is not one of"),
        ({"data": []}, "data must name at least one source"),
        ({"model": {"preset": "minimind2-26"}}, "Did you mean 'minimind2-26m'?"),
        ({"schema": 99}, "schema: 99 is not supported"),
        ({"model": {"preset": "minimind2-26m", "depth": True}}, "model.depth: Input should be a"),
        ({"train": {"seed": False}}, "train.seed: Input should be a valid integer (got False)"),
        (
            {"optim": {"max_grad_norm": True}},
            "optim.max_grad_norm: Input should be a valid number (got True)",
        ),
        (
            {"optim": {"matrices": {"betas": [0.9, 0.95]}}},
            "optim.matrices: needs a `kind` (known: muon, adamw, adamw8bit, adafactor)",
        ),
        ({"model": {"preset": "minimind2-26m", "vocab_size": 2**70}}, "equal to 16777216"),
        ({"train": {"keep": {"last": 0}}}, "train.keep: last=0 must be at least 1"),
    ],
)
def test_errors_name_the_key_and_the_remedy(changes, expected):
    with pytest.raises(UserError) as caught:
        from_dict(BASE | changes, "r.yaml")
    assert str(caught.value).startswith("r.yaml: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_merge_is_deep_and_migrate_marks_the_schema():
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}) == {"a": {"b": 1, "c": 3}}
    assert check_schema({})["schema"] == 1

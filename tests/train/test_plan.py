"""`resolve` decides a run's plan before it loads anything; three commands share that function."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
import yaml

from tinsmith.config import RunConfig, from_dict, load
from tinsmith.core.errors import UserError
from tinsmith.hub.hf import export_folder
from tinsmith.nn.config import Dropout
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.objectives.frozen import deterministic_config
from tinsmith.text.bpe import train_bpe
from tinsmith.text.config import TrainTokenizerConfig
from tinsmith.text.tokenizer import Tokenizer
from tinsmith.train import dryrun, plan, setup
from tinsmith.train.dryrun import dry_run
from tinsmith.train.plan import RunPlan, resolve
from tinsmith.train.trainer import train
from tinsmith.verbs import config as config_verb
from tinsmith.verbs.config import show

TASKS = {"kind": "tasks", "tasks": ["arithmetic"], "count": 60, "digits": 1}
TRAIN = {"steps": 2, "seq_len": 64, "batch_size": 4, "precision": "fp32"}
LORA = {"targets": "mixer.q_proj", "rank": 2, "dropout": 0.3}
SECTION = {"data": TASKS, "train": TRAIN}


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return train_bpe(["one and two and three and four " * 50], 300)


@pytest.fixture
def base(tmp_path, noisy, tokenizer):
    """A model folder with a vocabulary of 280, a tokenizer of 300 ids and dropout in its config."""
    model = ModelConfig.from_dict(noisy | {"vocab_size": 280})
    export_folder(LM(model), None, tmp_path / "bare")
    export_folder(LM(replace(model, vocab_size=300)), tokenizer, tmp_path / "whole")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    return tmp_path / "bare"


@pytest.fixture
def no_weight_reads(monkeypatch):
    """Make every attempt to read weights fail."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("tinsmith.hub.hf.materialize", refuse)
    monkeypatch.setattr("tinsmith.hub.load.materialize", refuse)


def assert_same_run(one: RunPlan, two: RunPlan) -> None:
    """Assert that both plans give the same run."""
    assert one.recipe() == two.recipe()
    assert (one.model_config, one.lora) == (two.model_config, two.lora)
    assert (one.device, one.mesh) == (two.device, two.mesh)
    if isinstance(one.tokenizer, Tokenizer):
        assert isinstance(two.tokenizer, Tokenizer)
        assert one.tokenizer.fingerprint() == two.tokenizer.fingerprint()
    else:
        assert one.tokenizer == two.tokenizer


def resolved_recipe(capsys, path) -> RunConfig:
    """Return the recipe that `config show --resolved` prints, read back from a file."""
    capsys.readouterr()
    show(path, [], [], resolved=True)
    printed = path.with_name("resolved.yaml")
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    return load(printed)


def test_a_plan_is_frozen(noisy):
    resolved = resolve(from_dict(SECTION | {"model": noisy, "objective": {"kind": "pretrain"}}))
    with pytest.raises(FrozenInstanceError):
        resolved.lora = None  # pyright: ignore[reportAttributeAccessIssue]
    assert resolved.device == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert (resolved.mesh.kind, resolved.mesh.world_size) == ("none", 1)
    assert resolved.tokenizer == TrainTokenizerConfig(vocab_size=320)


@pytest.mark.parametrize("kind", ["pretrain", "dpo", "grpo"])
def test_dropout_and_router_noise_are_off_for_objectives_that_compare_log_probabilities(
    kind, noisy
):
    recipe = SECTION | {"model": noisy, "lora": LORA, "objective": {"kind": kind}}
    resolved = resolve(from_dict(recipe))
    whole = ModelConfig.from_dict(noisy)
    assert resolved.lora is not None
    if kind == "pretrain":
        assert (resolved.model_config, resolved.lora.dropout) == (whole, 0.3)
    else:
        assert resolved.model_config == deterministic_config(whole) != whole
        assert resolved.lora.dropout == 0
    assert_same_run(resolved, resolve(resolved.recipe()))


@pytest.mark.parametrize("kind", ["dpo", "grpo", "ppo", "spo"])
@pytest.mark.parametrize(
    "feed_forward",
    [
        {"kind": "topk_moe", "experts": 4, "top_k": 2, "hidden_dim": 24, "z_weight": 0.1},
        {"kind": "deepseek_moe", "experts": 4, "top_k": 2, "hidden_dim": 24},
        {"kind": "dyn_moe", "experts": 4, "hidden_dim": 24, "router_grad": "smk"},
    ],
    ids=lambda config: config["kind"],
)
def test_E11_alignment_trains_no_router_losses_unless_they_are_set(kind, feed_forward, noisy):
    model = noisy | {"pattern": [noisy["pattern"][0] | {"feed_forward": feed_forward}]}
    weights = ("balance_weight", "z_weight", "sdl_weight")

    def router_losses(objective):
        recipe = SECTION | {"model": model, "objective": objective}
        config = resolve(from_dict(recipe)).model_config
        torch.manual_seed(0)
        lm = LM(replace(config, dropout=Dropout())).train()
        out = lm(torch.randint(300, (2, 8)))
        values = {n: v for n, v in out.losses.items() if n.rsplit(".", 1)[-1] != "indexer"}
        found = {n: getattr(config.layers[0].feed_forward, n, 0.0) for n in weights}
        return sum(found.values()), sum(abs(float(value)) for value in values.values())

    assert router_losses({"kind": kind}) == (0, 0)
    kept = router_losses({"kind": kind, "router_losses": True})
    assert kept == router_losses({"kind": "pretrain"})
    assert min(kept) > 0


def test_init_from_gives_model_and_tokenizer_without_reading_weights(
    base, tokenizer, no_weight_reads
):
    recipe = SECTION | {"init_from": str(base), "objective": {"kind": "sft"}}
    resolved = resolve(from_dict(recipe))
    assert resolved.model_config.vocab_size == tokenizer.vocab_size > 280
    assert isinstance(resolved.tokenizer, Tokenizer)
    assert resolved.tokenizer.fingerprint() == tokenizer.fingerprint()
    assert resolved.recipe().model == resolved.model_config
    assert resolved.recipe().tokenizer is None
    assert_same_run(resolved, resolve(resolved.recipe()))


@pytest.mark.parametrize("objective", ["sft", "grpo"])
def test_the_resolved_recipe_trains_the_same_weights(objective, base):
    recipe = SECTION | {"init_from": str(base), "objective": {"kind": objective}, "lora": LORA}
    config = from_dict(recipe)
    if objective == "grpo":
        config = replace(config, objective=replace(config.objective, max_new_tokens=4))
    resolved = resolve(config).recipe()
    assert resolved != config
    one, two = train(config, "one"), train(resolved, "two")
    last = "checkpoints/step-00000002/model.safetensors"
    assert (one / last).read_bytes() == (two / last).read_bytes()


def test_a_recipe_that_contradicts_init_from_is_refused(base, noisy):
    recipe = SECTION | {"init_from": str(base), "objective": {"kind": "sft"}}
    for wrong in ({"vocab_size": 290}, {"dim": 64}):
        with pytest.raises(UserError, match="model: differs from that of init_from"):
            resolve(from_dict(recipe | {"model": noisy | {"vocab_size": 280} | wrong}))
    with pytest.raises(UserError, match="tokenizer: has other ids than that of init_from"):
        resolve(from_dict(recipe | {"tokenizer": {"train": {"vocab_size": 300}}}))


def test_a_vocabulary_that_is_too_small_is_refused_before_the_data_are_read(tmp_path, noisy):
    train_bpe(["one and two and three and four " * 50], 300).save(tmp_path / "tokenizer")
    recipe = SECTION | {
        "model": noisy | {"vocab_size": 280},
        "tokenizer": {"path": str(tmp_path / "tokenizer")},
        "objective": {"kind": "pretrain"},
    }
    with pytest.raises(UserError, match=r"model\.vocab_size: 280 is smaller"):
        resolve(from_dict(recipe))


def test_learned_positions_of_init_from_limit_the_sequence_length(tmp_path, noisy, tokenizer):
    model = ModelConfig.from_dict(noisy | {"positions": "learned", "max_seq_len": 32})
    export_folder(LM(model), tokenizer, tmp_path / "learned")
    recipe = SECTION | {"init_from": str(tmp_path / "learned"), "objective": {"kind": "sft"}}
    with pytest.raises(UserError, match=r"^train\.seq_len=64 is beyond model\.max_seq_len=32"):
        resolve(from_dict(recipe))


def test_several_processes_share_the_batch(monkeypatch, noisy):
    recipe = SECTION | {"model": noisy, "objective": {"kind": "grpo", "num_minibatches": 2}}
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"parallel\.kind: none.*use ddp or fsdp"):
        resolve(from_dict(recipe))
    recipe["parallel"] = {"kind": "ddp"}
    assert resolve(from_dict(recipe)).mesh.world_size == 2
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"train\.batch_size: 4 must be a multiple"):
        resolve(from_dict(recipe))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"objective\.num_minibatches: 2 must divide"):
        resolve(from_dict(recipe))


def test_train_dry_run_and_config_show_each_call_resolve_once(monkeypatch, tmp_path, noisy):
    plans = []

    def counting_resolve(config):
        plans.append(original(config))
        return plans[-1]

    original = plan.resolve
    for module in (setup, dryrun, config_verb):
        monkeypatch.setattr(module, "resolve", counting_resolve)
    recipe = SECTION | {"model": noisy, "objective": {"kind": "pretrain"}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    config = from_dict(recipe)
    train(config, "run")
    dry_run(config, "dry")
    show(path, [], [], resolved=True)
    assert len(plans) == 3
    for each in plans:
        assert_same_run(each, plans[0])


def test_the_resolved_recipe_that_config_show_prints_gives_the_same_run(
    tmp_path, base, capsys, no_weight_reads
):
    recipe = SECTION | {"init_from": str(base), "objective": {"kind": "grpo"}, "lora": LORA}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    config = resolved_recipe(capsys, path)
    assert config.model is not None
    assert config.model.dropout == Dropout()
    assert config.optim.matrices.kind == "adamw"  # the default with `init_from`
    assert_same_run(resolve(config), resolve(from_dict(recipe)))

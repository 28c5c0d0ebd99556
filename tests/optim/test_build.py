"""All optimizers of a run: groups, schedule, saved state, reset of rows."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tinsmith.core.errors import UserError
from tinsmith.core.parse import parse
from tinsmith.core.yamlfile import read_yaml
from tinsmith.optim.build import Optimizers
from tinsmith.optim.config import AdamWConfig, MuonConfig, OptimConfig

MUON = OptimConfig(matrices=MuonConfig(weight_decay=0.1))
ADAMW = OptimConfig(matrices=AdamWConfig(lr=1e-3))
RECIPES = Path(__file__).parents[2] / "recipes"
BOTH = pytest.mark.parametrize("config", [MUON, ADAMW], ids=["muon", "adamw"])


def all_groups(optimizers):
    return [group for optimizer in optimizers.optimizers for group in optimizer.param_groups]


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


@BOTH
def test_every_parameter_is_in_exactly_one_optimizer_group(make_model, config):
    model, extra = make_model(tied=False), make_model(seed=1)
    optimizers = Optimizers.build(model, extra, config)
    grouped = [id(p) for group in all_groups(optimizers) for p in group["params"]]
    everyone = [id(p) for module in (model, extra) for p in module.parameters()]
    assert sorted(grouped) == sorted(everyone)
    assert sorted(map(id, optimizers.parameters())) == sorted(everyone)


@BOTH
def test_every_group_follows_the_schedule(make_model, config):
    optimizers = Optimizers.build(make_model(tied=False), None, config)
    assert set(optimizers.learning_rates()) == {"matrix", "embedding", "head", "router", "vector"}
    for multiplier in (1.0, 0.25, 0.5):
        optimizers.set_lr_multiplier(multiplier)
        rates = optimizers.learning_rates()
        assert rates.pop("matrix") == config.matrices.lr * multiplier
        assert set(rates.values()) == {config.others.lr * multiplier}


@BOTH
def test_a_multiplier_of_zero_changes_no_parameter(make_model, give_gradients, snapshot, config):
    model = make_model()
    optimizers = Optimizers.build(model, None, config)
    give_gradients(model, 0)
    before = snapshot(model)
    optimizers.set_lr_multiplier(0.0)
    optimizers.step()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    optimizers.set_lr_multiplier(1.0)
    optimizers.step()
    assert not any(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("decay", "shrunk"),
    [
        ("matrices", {"matrix"}),
        ("all", {"matrix", "embedding", "head", "router"}),
    ],
)
def test_weight_decay_applies_to_the_selected_roles_and_never_to_vectors(
    make_model, snapshot, decay, shrunk
):
    model = make_model(tied=False)
    config = AdamWConfig(lr=0.1, weight_decay=0.5, decay=decay)
    optimizers = Optimizers.build(model, None, OptimConfig(matrices=config, others=config))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = snapshot(model)
    optimizers.step()
    for group in all_groups(optimizers):
        factor = 0.95 if group["role"] in shrunk else 1.0
        for parameter in group["params"]:
            start = before[optimizers.param_names[parameter]]
            torch.testing.assert_close(parameter.detach(), start * factor)


def test_muon_does_not_cause_weight_decay_of_others(make_model):
    optimizers = Optimizers.build(make_model(tied=False), None, MUON)
    decays = {group["role"]: group["weight_decay"] for group in all_groups(optimizers)}
    assert decays.pop("matrix") == 0.1
    assert set(decays.values()) == {0.0}


def test_adamw_equals_its_formula(make_model, give_gradients, snapshot):
    model = make_model()
    config = AdamWConfig(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    optimizers = Optimizers.build(model, None, OptimConfig(matrices=config, others=config))
    expected, moments = snapshot(model), {}
    matrices = {
        n for n, p in model.named_parameters() if p in set(all_groups(optimizers)[0]["params"])
    }
    assert len(matrices) == 8
    for step in range(1, 4):
        give_gradients(model, step)
        optimizers.step()
        for name, parameter in model.named_parameters():
            first, second = moments.get(name, (0, 0))
            first = 0.8 * first + 0.2 * parameter.grad
            second = 0.9 * second + 0.1 * parameter.grad**2
            moments[name] = first, second
            decayed = expected[name] * (1 - 0.01 * 0.1 * (name in matrices))
            bias = (second / (1 - 0.9**step)).sqrt() + 1e-6
            expected[name] = decayed - 0.01 * first / (1 - 0.8**step) / bias
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_state_gives_bit_equal_next_steps(
    make_model, give_gradients, snapshot, config, dtype
):
    model, head = make_model(dtype=dtype), nn.Linear(6, 5).to(dtype)
    optimizers = Optimizers.build(model, head, config)
    for step in range(3):
        give_gradients(model, step)
        give_gradients(head, step)
        optimizers.step()
    saved = copies(optimizers.state_tensors())
    other, other_head = make_model(seed=5, dtype=dtype), nn.Linear(6, 5).to(dtype)
    other.load_state_dict(snapshot(model), strict=False)
    other_head.load_state_dict(head.state_dict())
    resumed = Optimizers.build(other, other_head, config)
    resumed.load_state_tensors(saved)
    for name, tensor in resumed.state_tensors().items():
        assert tensor.dtype == saved[name].dtype
        assert torch.equal(tensor, saved[name])
    for step in range(3, 5):
        for module in (model, head, other, other_head):
            give_gradients(module, step)
        optimizers.step()
        resumed.step()
    for a, b in ((model, other), (head, other_head)):
        for left, right in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(left, right)


def test_state_is_named_by_parameter_with_a_prefix_for_the_objective(make_model, give_gradients):
    model, head = make_model(), nn.Linear(6, 5).double()
    optimizers = Optimizers.build(model, head, MUON)
    assert optimizers.state_tensors() == {}
    give_gradients(model, 0)
    give_gradients(head, 0)
    optimizers.step()
    tensors = optimizers.state_tensors()
    assert tensors["blocks.0.up.weight|momentum"].shape == (10, 6)
    assert tensors["head.weight|exp_avg"].shape == (12, 6)
    assert tensors["head.weight|exp_avg_sq"].shape == (12, 6)
    assert tensors["head.weight|step"].item() == 1
    assert tensors["objective.weight|momentum"].shape == (5, 6)
    assert tensors["objective.bias|exp_avg"].shape == (5,)
    count = len(list(optimizers.parameters()))
    muon = sum(name.endswith("|momentum") for name in tensors)
    assert len(tensors) == muon + 3 * (count - muon)


@BOTH
def test_a_parameter_without_gradient_is_skipped_and_saved_as_zeros(
    make_model, give_gradients, snapshot, config
):
    def fresh():
        model = make_model()
        return model, Optimizers.build(model, None, config)

    def give(model, step, all_of_them):
        give_gradients(model, step)
        if not all_of_them:
            model.blocks[0].up.weight.grad = None
            model.blocks[0].norm.weight.grad = None

    model, optimizers = fresh()
    start = model.blocks[0].up.weight.detach().clone()
    give(model, 0, False)
    optimizers.step()
    assert torch.equal(model.blocks[0].up.weight, start)
    saved = copies(optimizers.state_tensors())
    for name in (
        n for n in saved if n.startswith(("blocks.0.up.weight|", "blocks.0.norm.weight|"))
    ):
        assert not saved[name].any()
    other, resumed = fresh()
    other.load_state_dict(snapshot(model), strict=False)
    resumed.load_state_tensors(saved)
    for module, object_ in ((model, optimizers), (other, resumed)):
        give(module, 1, True)
        object_.step()
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


@BOTH
def test_empty_state_loads_as_a_fresh_optimizer(make_model, give_gradients, config):
    model = make_model()
    optimizers = Optimizers.build(model, None, config)
    give_gradients(model, 0)
    optimizers.step()
    optimizers.load_state_tensors({})
    assert optimizers.state_tensors() == {}


@BOTH
def test_mismatched_state_is_refused_in_one_line_and_changes_nothing(
    make_model, give_gradients, config
):
    model = make_model()
    optimizers = Optimizers.build(model, None, config)
    give_gradients(model, 0)
    optimizers.step()
    good = copies(optimizers.state_tensors())
    name = "blocks.1.norm.bias|exp_avg"
    cases = {
        f"'{name}' is missing": {k: v for k, v in good.items() if k != name},
        "'blocks.7.up|momentum' belongs to no": good | {"blocks.7.up|momentum": torch.zeros(2, 2)},
        f"'{name}' has the shape (7,), not (6,)": good | {name: torch.zeros(7)},
        "'head.weight|step' has the shape (1,), not ()": good | {"head.weight|step": torch.ones(1)},
    }
    for output, tensors in cases.items():
        with pytest.raises(UserError) as error:
            optimizers.load_state_tensors({k: v * 2 for k, v in tensors.items()})
        assert output in str(error.value)
        assert "\n" not in str(error.value)
        now = optimizers.state_tensors()
        assert all(torch.equal(now[key], good[key]) for key in good)


def test_state_of_another_optimizer_is_refused(make_model, give_gradients):
    model = make_model()
    optimizers = Optimizers.build(model, None, MUON)
    give_gradients(model, 0)
    optimizers.step()
    other = Optimizers.build(model, None, ADAMW)
    with pytest.raises(UserError, match=r"\|step' is missing"):
        other.load_state_tensors(optimizers.state_tensors())


@BOTH
def test_reset_state_zeroes_exactly_the_rows(make_model, give_gradients, config):
    model = make_model()
    optimizers = Optimizers.build(model, None, config)
    give_gradients(model, 0)
    optimizers.step()
    block = model.blocks[0]
    resets = {
        "blocks.0.experts.up": (block.experts.up, [0, 2]),
        "blocks.0.experts.router.gate.weight": (block.experts.router.gate.weight, [1]),
        "blocks.0.up.bias": (block.up.bias, [3]),
    }
    expected = copies(optimizers.state_tensors())
    for name, (_, rows) in resets.items():
        for key in ("momentum", "exp_avg", "exp_avg_sq"):
            if f"{name}|{key}" in expected:
                assert expected[f"{name}|{key}"].all()
                expected[f"{name}|{key}"][rows] = 0
    optimizers.reset_state([(parameter, torch.tensor(rows)) for parameter, rows in resets.values()])
    now = optimizers.state_tensors()
    assert now.keys() == expected.keys()
    assert all(torch.equal(now[name], expected[name]) for name in now)


def test_reset_state_before_the_first_step_or_of_frozen_parameters_does_nothing(make_model):
    model = make_model()
    model.blocks[0].up.weight.requires_grad = False
    optimizers = Optimizers.build(model, None, MUON)
    rows = torch.tensor([0])
    optimizers.reset_state([(model.blocks[0].up.weight, rows), (model.embed.weight, rows)])
    assert optimizers.state_tensors() == {}


def test_frozen_parameters_have_no_moments(make_model, give_gradients):
    model = make_model()
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad = False
    optimizers = Optimizers.build(model, None, MUON)
    give_gradients(model, 0)
    optimizers.step()
    assert not any(name.startswith("blocks.0") for name in optimizers.state_tensors())
    kept = {id(p) for optimizer in optimizers.optimizers for p in optimizer.state}
    assert kept == {id(p) for p in model.parameters() if p.requires_grad}


def test_zero_grad_drops_gradients(make_model, give_gradients):
    model = make_model()
    optimizers = Optimizers.build(model, None, MUON)
    give_gradients(model, 0)
    optimizers.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_objective_must_not_own_parameters_of_the_policy(make_model):
    model = make_model()
    with pytest.raises(AssertionError, match="include the policy's"):
        Optimizers.build(model, nn.ModuleList([model.embed]), MUON)


def test_two_runs_are_bit_equal(make_model, give_gradients, snapshot):
    results = []
    for _ in range(2):
        model = make_model(dtype=torch.float32)
        optimizers = Optimizers.build(model, None, MUON)
        for step in range(3):
            give_gradients(model, step)
            optimizers.step()
        results.append(snapshot(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_E10_a_weight_decay_of_others_without_effect_is_a_warning():
    assert OptimConfig().others.warning() is None
    assert OptimConfig.for_finetuning(1e-5).others.warning() is None
    section = {"others": {"kind": "adamw", "weight_decay": 0.1}}
    warning = parse(OptimConfig, section).others.warning()
    assert warning is not None
    assert warning.startswith("optim.others.weight_decay=0.1 has no effect")
    section["others"]["decay"] = "all"
    assert parse(OptimConfig, section).others.warning() is None


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda p: p.stem)
def test_E10_no_recipe_has_a_weight_decay_without_effect(path):
    optim = read_yaml(path).get("optim")
    assert optim is None or parse(OptimConfig, optim).others.warning() is None

"""Memory-efficient optimizers: size of the state, bit-exact resume, reset of rows."""

import sys

import pytest
import torch
from torch import Tensor, nn

from tinsmith.config import from_dict
from tinsmith.core.errors import UserError
from tinsmith.optim.build import Optimizers
from tinsmith.optim.config import AdafactorConfig, AdamW8bitConfig, AdamWConfig, OptimConfig

ADAFACTOR = OptimConfig(matrices=AdafactorConfig(lr=0.1, weight_decay=0.1))
EIGHT = OptimConfig(matrices=AdamW8bitConfig(lr=1e-2))
BOTH = pytest.mark.parametrize("config", [ADAFACTOR, EIGHT], ids=["adafactor", "adamw8bit"])
E, H, D = 4, 40, 64


class Model(nn.Module):
    EXPERT_STACKS = ("stack",)

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(D, 80, bias=False)
        self.small = nn.Linear(8, 6)
        self.stack = nn.Parameter(torch.randn(E, H, D))


def fresh(config, seed=0):
    torch.manual_seed(seed)
    model = Model()
    return model, Optimizers.build(model, None, config)


def steps(model, optimizers, numbers, give_gradients):
    for number in numbers:
        give_gradients(model, number)
        optimizers.step()


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def bytes_of(optimizers, name):
    state = optimizers.state_tensors().items()
    return sum(t.numel() * t.element_size() for key, t in state if key.startswith(f"{name}|"))


def test_state_sizes_equal_the_declared_bytes_per_parameter(give_gradients):
    adafactor, eight = fresh(ADAFACTOR), fresh(EIGHT)
    for made in (adafactor, eight):
        steps(*made, range(2), give_gradients)
    assert bytes_of(adafactor[1], "stack") == 4 * (E * (H + D) + 1)
    assert bytes_of(adafactor[1], "large.weight") == 4 * (80 + D + 1)
    assert bytes_of(eight[1], "stack") == 2 * E * H * D + 2 * 4 * E * H * D // 256 + 4
    assert bytes_of(eight[1], "small.weight") == 2 * 4 * 48 + 4


def test_adamw8bit_stays_close_to_adamw(give_gradients):
    whole = OptimConfig(matrices=AdamWConfig(lr=1e-2))
    made = [fresh(config) for config in (whole, EIGHT)]
    begun = made[0][0].stack.detach().clone()
    for each in made:
        steps(*each, range(5), give_gradients)
    one, two = (model.stack.detach() - begun for model, _ in made)
    assert (one - two).norm() < 0.05 * one.norm()
    assert not torch.equal(one, two)


def test_adafactor_makes_the_first_step_of_its_paper(give_gradients):
    """Its first one: beta2 is 0, the update clipped to 1, times the weight's root mean square."""
    model, optimizers = fresh(OptimConfig(matrices=AdafactorConfig(lr=0.1)))
    begun = model.stack.detach().clone()
    give_gradients(model, 0)
    squares = model.stack.grad.square()
    rows, columns = squares.mean(-1, keepdim=True), squares.mean(-2, keepdim=True)
    update = model.stack.grad / (rows * columns / rows.mean(-2, keepdim=True)).sqrt()
    optimizers.step()
    rms = begun.square().mean().sqrt()
    clipped = update / update.square().mean().sqrt().clamp(min=1)
    torch.testing.assert_close(model.stack.detach(), begun - 0.1 * rms * clipped)


@BOTH
def test_T2_saved_state_gives_bit_equal_next_steps(config, give_gradients):
    model, optimizers = fresh(config)
    steps(model, optimizers, range(3), give_gradients)
    saved = copies(optimizers.state_tensors())
    other, resumed = fresh(config, seed=1)
    other.load_state_dict(model.state_dict())
    resumed.load_state_tensors(copies(saved))
    again = resumed.state_tensors()
    assert again.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in again.items())
    for made in ((model, optimizers), (other, resumed)):
        steps(*made, range(3, 6), give_gradients)
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


@BOTH
def test_a_parameter_without_gradient_is_saved_with_its_initial_state(config, give_gradients):
    first, second = fresh(config), fresh(config)
    for model, optimizers in (first, second):
        give_gradients(model, 0)
        model.stack.grad = None
        optimizers.step()
    second[1].load_state_tensors(copies(first[1].state_tensors()))
    for made in (first, second):
        steps(*made, range(1, 3), give_gradients)
    assert torch.equal(first[0].stack, second[0].stack)


def moments(optimizers: Optimizers, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    """Of an 8-bit optimizer, made whole."""
    state = optimizers.state_ios[parameter].optimizer.state[parameter]
    first, second = (
        (state[f"qmap{n}"][state[f"state{n}"].long()].flatten().view(-1, 256))
        * state[f"absmax{n}"][:, None]
        for n in (1, 2)
    )
    return first.view_as(parameter), second.view_as(parameter)


def test_reset_state_of_adamw8bit_resets_exactly_the_rows(give_gradients):
    model, optimizers = fresh(EIGHT)
    steps(model, optimizers, range(3), give_gradients)
    before = [moment.clone() for moment in moments(optimizers, model.stack)]
    optimizers.reset_state([(model.stack, torch.tensor([1, 3]))])
    for old, new in zip(before, moments(optimizers, model.stack), strict=True):
        assert not new[[1, 3]].any()
        assert torch.equal(new[[0, 2]], old[[0, 2]])
        assert bool(new[[0, 2]].any())
    optimizers.reset_state([(model.small.weight, torch.tensor([2]))])
    state = optimizers.state_tensors()
    for key in ("state1", "state2"):
        rows = state[f"small.weight|{key}"].bool().any(1)
        assert rows.tolist() == [True, True, False, True, True, True]


def test_reset_state_of_adafactor_resets_exactly_the_experts(give_gradients):
    model, optimizers = fresh(ADAFACTOR)
    steps(model, optimizers, range(3), give_gradients)
    before = copies(optimizers.state_tensors())
    optimizers.reset_state([(model.stack, torch.tensor([2]))])
    after = optimizers.state_tensors()
    for key in ("row_var", "col_var"):
        before[f"stack|{key}"][2] = 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@BOTH
def test_state_of_another_kind_is_refused_in_one_line(config, give_gradients):
    model, optimizers = fresh(config)
    steps(model, optimizers, range(1), give_gradients)
    other = fresh(OptimConfig(matrices=AdamWConfig()))[1]
    with pytest.raises(UserError, match="is missing; it was saved by another model or another"):
        other.load_state_tensors(optimizers.state_tensors())


def test_missing_bitsandbytes_gives_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(UserError, match="adamw8bit needs bitsandbytes, which is not installed"):
        fresh(EIGHT)


@pytest.mark.parametrize(
    ("matrices", "expected"),
    [
        ({"kind": "adafactor", "lr": -1}, "lr=-1.0 must be a number of at least 0"),
        ({"kind": "adafactor", "beta2_decay": 1}, "beta2_decay=1.0 must be at most 0"),
        ({"kind": "adafactor", "clip_update": 0}, "clip_update=0.0 must be at least 1"),
        ({"kind": "adamw8bit", "betas": [0.9, 1]}, r"betas\[1\]=1.0 must be at least 0 and below"),
    ],
    ids=str,
)
def test_invalid_values_are_refused_in_one_line(matrices, expected):
    with pytest.raises(UserError, match=expected):
        recipe(optim={"matrices": matrices})


@pytest.mark.parametrize("kind", ["adafactor", "adamw8bit"])
def test_sharded_weights_are_refused(kind):
    with pytest.raises(UserError, match=f"kind=fsdp: optim.matrices.kind={kind}"):
        recipe(optim={"matrices": {"kind": kind}}, parallel={"kind": "fsdp"})
    recipe(optim={"matrices": {"kind": kind}}, parallel={"kind": "ddp"})


def recipe(**changes):
    base = {"model": {"preset": "minimind2-26m"}, "data": {"kind": "stdlib"}}
    return from_dict(base | {"objective": {"kind": "pretrain"}} | changes)

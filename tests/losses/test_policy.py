"""Policy losses against Liger, TRL and plain loops, and their invariants."""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.oracles import policy as oracle
from tinsmith.core.errors import UserError
from tinsmith.core.parse import parse
from tinsmith.losses.logprobs import kl
from tinsmith.losses.policy import PolicyLoss, kl_penalty
from tinsmith.objectives.ppo import policy_loss, value_loss
from tinsmith.objectives.rl.advantages import gae, group_advantages

LOSSES = ["grpo", "dapo", "dr_grpo", "cispo"]
"""Those with a ratio per token."""


def grpo_loss(new, old, reference, advantages, mask, *, clip_low, clip_high, kl_coef, loss, **more):
    """The whole loss, a scalar, as the objective computes it."""
    kind = parse(PolicyLoss, {"kind": loss, "clip_low": clip_low, "clip_high": clip_high})
    each = kind.per_token(kind.log_ratio(new, old, mask), advantages, new, mask)
    if kl_coef:
        each = each + kl_coef * kl_penalty(new, reference, mask, more.get("kl_estimator", "k3"))
    units = kind.units(mask, more.get("max_length", mask.shape[1]))
    return kind.sum(each, mask) / units.clamp(min=1)


@pytest.fixture
def case():
    """Log-probabilities (6, 9) of three policies, advantages, and answers of 0 to 9 tokens."""
    make = torch.Generator().manual_seed(3)
    new, old, reference = (
        -2 + 0.6 * torch.randn(6, 9, dtype=torch.float64, generator=make) for _ in range(3)
    )
    lengths = torch.tensor([9, 1, 5, 0, 7, 3])
    mask = torch.arange(9) < lengths[:, None]
    advantages = torch.randn(6, dtype=torch.float64, generator=make)
    return new.requires_grad_(), old, reference, advantages, mask


def keywords(loss: str, **changed: float) -> dict:
    extra = {"max_length": 9} if loss == "dr_grpo" else {}
    return {"clip_low": 0.2, "clip_high": 0.3, "kl_coef": 0.04, "loss": loss} | extra | changed


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_equal_liger(loss, beta, case):
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    new, old, reference, advantages, mask = case
    high = 1.3 if loss == "cispo" else 0.3
    expected, _ = liger.LigerFusedLinearGRPOFunction.ppo_loss_fn(
        new,
        mask.double(),
        advantages,
        mask.double(),
        ref_per_token_logps=reference,
        old_per_token_logps=old,
        epsilon_low=0.2,
        epsilon_high=high,
        beta=beta,
        loss_type=loss,
        max_completion_length=9,
    )
    (slope,) = torch.autograd.grad(expected, new)
    reported = reference if beta else None
    found = grpo_loss(new, old, reported, advantages, mask, **keywords(loss, kl_coef=beta))
    assert torch.allclose(found, expected, atol=1e-12)
    (own,) = torch.autograd.grad(found, new)
    assert torch.allclose(own, slope, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_advantages_per_row_and_per_token_are_the_same(loss, case):
    new, old, reference, advantages, mask = case
    rows = grpo_loss(new, old, reference, advantages, mask, **keywords(loss))
    wide = advantages[:, None].expand_as(new)
    tokens = grpo_loss(new, old, reference, wide, mask.double(), **keywords(loss))
    assert torch.equal(rows, tokens)


@pytest.mark.parametrize("loss", LOSSES)
def test_masked_positions_get_exactly_zero_gradient(loss, case):
    """Whatever stands there, infinities included."""
    new, old, reference, advantages, mask = case
    with torch.no_grad():
        new[~mask], reference[~mask] = -math.inf, math.nan
    total = grpo_loss(new, old, reference, advantages, mask, **keywords(loss))
    total = total + policy_loss(new, old, advantages, mask, 0.2)
    total = total + value_loss(new, old, reference, mask, 0.2)
    (slope,) = torch.autograd.grad(total, new)
    assert bool((slope[~mask] == 0).all())
    assert bool(torch.isfinite(slope).all())
    assert bool((slope[mask] != 0).any())


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_that_of_reinforce_if_old_equals_new(loss, case):
    new, _, _, advantages, mask = case
    (found,) = torch.autograd.grad(
        grpo_loss(new, new.detach(), None, advantages, mask, **keywords(loss, kl_coef=0.0)), new
    )
    tokens = mask.sum()
    scale = {
        "grpo": 1 / (6 * mask.sum(1, keepdim=True).clamp(min=1)),
        "dapo": 1 / tokens,
        "cispo": 1 / tokens,
        "dr_grpo": torch.tensor(1 / 54),
    }[loss]
    assert torch.allclose(found, -advantages[:, None] * mask * scale, atol=1e-15)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_group_of_equal_rewards_has_zero_gradient(loss, case):
    new, old, _, _, mask = case
    advantages = group_advantages(torch.full((2, 3), 0.7, dtype=torch.float64)).flatten()
    (slope,) = torch.autograd.grad(
        grpo_loss(new, old, None, advantages, mask, **keywords(loss, kl_coef=0.0)), new
    )
    assert bool((slope == 0).all())


def test_group_advantages_use_the_population_deviation():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 5.0]], dtype=torch.float64)
    found = group_advantages(rewards)
    values = rewards.numpy()
    spread = values.std(1, keepdims=True) + 1e-4
    assert np.allclose(found.numpy(), (values - values.mean(1, keepdims=True)) / spread, atol=1e-14)
    assert group_advantages(torch.full((1, 3), 1 / 3)).tolist() == [[0.0, 0.0, 0.0]]


def test_the_ratio_is_clipped_only_where_the_objective_would_increase():
    new = torch.log(torch.tensor([[1.5, 1.5, 0.5, 0.5]], dtype=torch.float64)).requires_grad_()
    old = torch.zeros(1, 4, dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    (slope,) = torch.autograd.grad(policy_loss(new, old, advantages, mask, 0.2), new)
    assert slope[0].tolist() == pytest.approx([0.0, 1.5 / 4, -0.5 / 4, 0.0])


def test_policy_and_value_loss_equal_plain_loops(case):
    new, old, returns, _, mask = case
    advantages = returns + 2
    found = policy_loss(new, old, advantages, mask, 0.2).item()
    arrays = [t.detach().numpy() for t in (new, old, advantages, mask)]
    assert found == pytest.approx(oracle.policy_loss(*arrays, 0.2), abs=1e-12)
    found = value_loss(new, old, returns, mask, 0.2).item()
    arrays = [t.detach().numpy() for t in (new, old, returns, mask)]
    assert found == pytest.approx(oracle.value_loss(*arrays, 0.2), abs=1e-12)


def test_a_batch_without_tokens_gives_zero(case):
    new, old, reference, advantages, mask = case
    none = torch.zeros_like(mask)
    for loss in LOSSES:
        total = grpo_loss(new, old, reference, advantages, none, **keywords(loss))
        assert total.item() == 0
    assert policy_loss(new, old, advantages, none, 0.2).item() == 0
    assert value_loss(new, old, reference, none, 0.2).item() == 0


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.97, 0.9), (1.0, 0.0)])
def test_gae_equals_the_sum_of_its_definition(gamma, lam, case):
    """Including masks with gaps: tool results are no actions."""
    _, rewards, values, _, mask = case
    holes = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.7)
    for each in (mask, holes):
        found = gae(rewards, values, each, gamma, lam)
        arrays = [t.numpy() for t in (rewards, values, each)]
        expected = oracle.gae(*arrays, gamma, lam)
        for one, two in zip(found, expected, strict=True):
            assert np.allclose(one.numpy(), two, atol=1e-12)
            assert bool((one[~each] == 0).all())


def test_with_gamma_and_lambda_1_the_advantage_is_return_minus_value(case):
    _, _, values, _, mask = case
    rewards = torch.zeros_like(values)
    rewards[torch.arange(6), (mask.sum(1) - 1).clamp(min=0)] = torch.arange(6).double()
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    expected = (torch.arange(6).double()[:, None] - values).masked_fill(~mask, 0)
    assert torch.allclose(advantages, expected, atol=1e-12)
    assert torch.allclose(returns, (advantages + values).masked_fill(~mask, 0), atol=1e-12)


def enumerated(estimator: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """E over every sequence of 3 tokens of the estimator's gradient, and the gradients of KL(new
    || reference) and KL(reference || new), at the same logits.
    """
    make = torch.Generator().manual_seed(5)
    logits, other = torch.randn(2, 3, 4, dtype=torch.float64, generator=make)
    logits.requires_grad_()
    new, reference = logits.log_softmax(-1), other.log_softmax(-1)
    expectation = torch.zeros((), dtype=torch.float64)
    for ids in itertools.product(range(4), repeat=3):
        own = new[torch.arange(3), torch.tensor(ids)]
        reported = reference[torch.arange(3), torch.tensor(ids)]
        probability = own.sum().exp().detach()
        expectation = expectation + probability * kl(own, reported, estimator).sum()
    reverse = (new.exp() * (new - reference)).sum()
    forward = (reference.exp() * (reference - new)).sum()
    return tuple(torch.autograd.grad(each, logits, retain_graph=True)[0] for each in
                 (expectation, reverse, forward))  # fmt: skip


def test_k1_has_no_expected_gradient_k2_is_reverse_and_k3_forward_kl():
    found, reverse, forward = enumerated("k1")
    assert torch.allclose(found, torch.zeros_like(found), atol=1e-14)
    assert torch.allclose(enumerated("k2")[0], reverse, atol=1e-14)
    assert torch.allclose(enumerated("k3")[0], forward, atol=1e-14)
    assert not torch.allclose(reverse, forward, atol=1e-3)


@pytest.mark.parametrize("kl_estimator", ["k2", "k3"])
@pytest.mark.parametrize("apart", [100.0, -100.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_ratios_beyond_float32_are_finite_and_clipped_ones_have_no_gradient(
    loss, apart, kl_estimator
):
    """exp(89) is infinite in float32, and 0 * infinity no number."""
    old = torch.tensor([[-1.0, -1.0, -1.0]])
    new = (old + apart).requires_grad_()
    advantages, mask = torch.tensor([[1.0, 0.0, -1.0]]), torch.ones(1, 3, dtype=torch.bool)
    reported = keywords(loss, kl_coef=0.04) | {"kl_estimator": kl_estimator}
    total = grpo_loss(new, old, old, advantages, mask, **reported)
    (slope,) = torch.autograd.grad(total, new)
    assert bool(torch.isfinite(total))
    assert bool(torch.isfinite(slope).all())
    total = policy_loss(new, old, advantages, mask, 0.2)
    (slope,) = torch.autograd.grad(total, new)
    assert bool(torch.isfinite(total))
    assert slope[0, 1] == 0
    assert slope[0, 0 if apart > 0 else 2] == 0, "clipped"


def test_an_unknown_loss_is_refused(case):
    new, old, reference, advantages, mask = case
    with pytest.raises(UserError, match="'nope' is not one of grpo, dapo, dr_grpo, cispo, gspo"):
        grpo_loss(new, old, reference, advantages, mask, **keywords("nope"))


def test_a_bare_name_is_refused_with_the_correct_syntax():
    with pytest.raises(UserError, match=r"^loss: write \{kind: dapo\}$"):
        parse(PolicyLoss, "dapo", "loss")


class TestGSPO:
    """Group sequence policy optimisation (2507.18071)."""

    def loss(self, case, low=0.05, high=0.08):
        new, old, _, advantages, mask = case
        settings = {"clip_low": low, "clip_high": high, "kl_coef": 0.0, "loss": "gspo"}
        return grpo_loss(new, old, None, advantages, mask, **settings)

    def test_loss_and_gradient_equal_trl(self, case):
        """TRL's importance_sampling_level="sequence", with rows of tokens that are averaged."""
        new, old, _, advantages, mask = case
        trainer = trl_trainer(epsilon_low=0.05, epsilon_high=0.08)
        inputs = {
            "prompt_ids": torch.zeros(6, 1, dtype=torch.long),
            "prompt_mask": torch.ones(6, 1, dtype=torch.long),
            "completion_ids": torch.zeros(6, 9, dtype=torch.long),
            "completion_mask": mask.long(),
            "advantages": advantages,
            "old_per_token_logps": old,
        }
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
            new,
            torch.zeros_like(new),
            None,
        )
        expected = trainer._compute_loss(None, inputs)
        found = self.loss(case)
        (slope,) = torch.autograd.grad(expected, new)
        (own,) = torch.autograd.grad(found, new)
        assert torch.allclose(found, expected, atol=1e-12)
        assert torch.allclose(own, slope, atol=1e-12)

    def test_it_is_the_formula_row_by_row(self, case):
        new, old, _, advantages, mask = case
        total = 0.0
        for row in range(6):
            steps = [(new[row, t] - old[row, t]).item() for t in range(9) if mask[row, t]]
            ratio = math.exp(sum(steps) / max(1, len(steps)))
            bounded = min(max(ratio, 0.95), 1.08)
            advantage = advantages[row].item()
            total -= min(ratio * advantage, bounded * advantage) if steps else 0.0
        assert self.loss(case).item() == pytest.approx(total / 6, abs=1e-12)

    def test_it_differs_from_ratios_of_tokens(self, case):
        new, old, _, advantages, mask = case
        settings = {"clip_low": 0.05, "clip_high": 0.08, "kl_coef": 0.0, "loss": "grpo"}
        token_level = grpo_loss(new, old, None, advantages, mask, **settings)
        assert abs(self.loss(case).item() - token_level.item()) > 1e-3

    def test_all_tokens_of_a_row_share_their_gradient(self, case):
        new, mask = case[0], case[-1]
        (slope,) = torch.autograd.grad(self.loss(case, 0.5, 0.5), new)
        for row, length in zip(slope, mask.sum(1).tolist(), strict=True):
            assert row[:length].unique().numel() <= 1
            assert not row[length:].any()

    def test_default_bounds_are_those_of_the_paper(self):
        loss = parse(PolicyLoss, {"kind": "gspo"})
        assert (loss.clip_low, loss.clip_high) == (3e-4, 4e-4)


def trl_trainer(epsilon_low, epsilon_high):
    """TRL's GRPO trainer, with only the attributes that its loss reads."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    trainer = object.__new__(grpo_trainer.GRPOTrainer)
    state = {
        **{"importance_sampling_level": "sequence", "loss_type": "grpo", "beta": 0.0},
        **{"epsilon_low": epsilon_low, "epsilon_high": epsilon_high, "use_vllm": False},
        **{"aux_loss_enabled": False, "top_entropy_quantile": 1.0, "_entropy_bonus_enabled": False},
        **{"off_policy_mask_threshold": None, "args": SimpleNamespace(delta=None)},
        "model": SimpleNamespace(training=False),
        "accelerator": SimpleNamespace(
            gather=lambda tensor: tensor, reduce=lambda tensor, **_: tensor
        ),
        "_metrics": {"eval": defaultdict(list)},
    }
    trainer.__dict__.update(state)
    return trainer


def test_integer_rewards_are_treated_like_floats():
    assert torch.equal(
        group_advantages(torch.tensor([[1, 0, 0, 1]])),
        group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]])),
    )

"""Preference losses against reference implementations, and invariants of training with them."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from tinsmith.core.errors import UserError
from tinsmith.core.parse import parse
from tinsmith.data.loader.batch import Batch
from tinsmith.losses import chunked_head, logprobs
from tinsmith.losses.preference import dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss
from tinsmith.nn.config import Layer, ModelConfig
from tinsmith.nn.feedforwards import SwiGLU
from tinsmith.nn.mixers import GQA
from tinsmith.nn.model import LM
from tinsmith.objectives import ObjectiveConfig
from tinsmith.objectives.dpo import DPO, pair_logprobs
from tinsmith.objectives.frozen import reference_model

LOSSES = ("sigmoid", "ipo", "simpo", "orpo", "kto")
PAIRS = 3


@pytest.fixture
def four():
    """Summed log-probabilities of policy and reference, chosen and rejected, (5,) each, float64."""
    return [(-10 * torch.rand(5, dtype=torch.float64)).requires_grad_() for _ in range(4)]


@pytest.fixture
def means():
    return [(-3 * torch.rand(5, dtype=torch.float64)).requires_grad_() for _ in range(2)]


def tiny(seed=0):
    torch.manual_seed(seed)
    layer = Layer(mixer=GQA(heads=2), feed_forward=SwiGLU(hidden_dim=24))
    return LM(
        ModelConfig(vocab_size=40, dim=16, depth=2, max_seq_len=32, pattern=(layer,))
    ).double()


@pytest.fixture
def batch():
    """Three pairs of different lengths, prompts of three tokens."""
    ids = torch.randint(3, 40, (2 * PAIRS, 12))
    ids[1::2, :4] = ids[0::2, :4]
    lengths = torch.tensor([11, 7, 5, 9, 8, 6])
    place = torch.arange(11).expand(2 * PAIRS, 11)
    real = place < lengths[:, None]
    mask = real & (place >= 3)
    return Batch(
        ids[:, :-1].where(real, 0),
        ids[:, 1:].where(mask, 0),
        mask,
        place.where(real, 0),
        torch.zeros_like(place).where(real, -1),
        torch.zeros(2 * PAIRS, dtype=torch.long),
    )


def built(loss="sigmoid", frozen_model=None, **more):
    objective = DPO(loss=loss, **more).build()
    if frozen_model is not None:
        objective.frozen_models = {"reference": frozen_model}
    return objective


def frozen(seed=0):
    return tiny(seed).eval().requires_grad_(False)


def gradients(objective, policy, batch):
    policy.zero_grad()
    loss = objective.loss(policy, batch)
    loss.total.backward()
    return loss, [p.grad.clone() for p in policy.parameters()]


def test_dpo_equals_liger(four):
    module = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss")
    oracle = module.LigerFusedLinearDPOFunction.preference_loss_fn
    pc, pr, rc, rr = four
    loss, chosen, rejected = dpo_loss(pc, pr, rc, rr, 0.3)
    expected = oracle(pc, pr, torch.zeros(10), rc, rr, beta=0.3)
    assert torch.allclose(loss.mean(), expected[0], atol=1e-12)
    assert torch.allclose(chosen, expected[1], atol=1e-12)
    assert torch.allclose(rejected, expected[2], atol=1e-12)
    one = torch.autograd.grad(loss.mean(), [pc, pr])
    two = torch.autograd.grad(expected[0], [pc, pr])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(one, two, strict=True))


def test_dpo_equals_the_formula_of_the_paper(four):
    pc, pr, rc, rr = (t.detach() for t in four)
    loss, _, _ = dpo_loss(pc, pr, rc, rr, 0.2)
    expected = [
        -math.log(1 / (1 + math.exp(-0.2 * ((a - c) - (b - d)))))
        for a, b, c, d in zip(*(t.tolist() for t in (pc, pr, rc, rr)), strict=True)
    ]
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)


def test_label_smoothing_mixes_with_the_loss_of_exchanged_sides(four):
    pc, pr, rc, rr = four
    smooth, _, _ = dpo_loss(pc, pr, rc, rr, 0.5, 0.2)
    expected = 0.8 * dpo_loss(pc, pr, rc, rr, 0.5)[0] + 0.2 * dpo_loss(pr, pc, rr, rc, 0.5)[0]
    assert torch.allclose(smooth, expected, atol=1e-12)


def test_rewards_have_no_gradient(four, means):
    for found in (
        dpo_loss(*four, 0.1),
        ipo_loss(*four, 0.1),
        kto_loss(*four, 0.1, 0.0),
        simpo_loss(*means, 2.0),
        orpo_loss(*means, 0.1),
    ):
        assert found[0].requires_grad
        assert not found[1].requires_grad
        assert not found[2].requires_grad
        assert all(part.shape == (5,) for part in found)


def test_simpo_equals_liger(means):
    module = pytest.importorskip("liger_kernel.chunked_loss.simpo_loss")
    oracle = module.LigerFusedLinearSimPOFunction.preference_loss_fn
    loss, chosen, _ = simpo_loss(*means, 2.0, 0.7)
    expected = oracle(*means, torch.zeros(10), beta=2.0, gamma=0.7)
    assert torch.allclose(loss.mean(), expected[0], atol=1e-12)
    assert torch.allclose(chosen, expected[1], atol=1e-12)


def test_orpo_equals_liger_plus_the_likelihood_of_the_chosen(means):
    module = pytest.importorskip("liger_kernel.chunked_loss.orpo_loss")
    oracle = module.LigerFusedLinearORPOFunction.preference_loss_fn
    loss, _, _ = orpo_loss(*means, 0.4)
    expected = oracle(*means, torch.zeros(10), beta=0.4)[0] - means[0].mean()
    assert torch.allclose(loss.mean(), expected, atol=1e-12)


def test_orpo_of_a_completion_with_probability_one_is_finite():
    mean = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss, _, _ = orpo_loss(mean, mean - 1, 0.4)
    loss.sum().backward()
    assert bool(torch.isfinite(loss).all())
    assert bool(torch.isfinite(mean.grad).all())


def test_kto_equals_liger(four):
    module = pytest.importorskip("liger_kernel.chunked_loss.kto_loss")
    oracle = module.LigerFusedLinearKTOFunction.preference_loss_fn
    pc, pr, rc, rr = four
    loss, chosen, rejected = kto_loss(pc, pr, rc, rr, 0.3, 0.8)
    labels = torch.arange(10) < 5
    expected = oracle(
        torch.cat((pc, pr)), labels, torch.zeros(10), torch.cat((rc, rr)), beta=0.3, kl=0.8
    )
    assert torch.allclose(loss.sum() / 10, expected[0], atol=1e-12)
    assert torch.allclose(chosen.sum(), expected[1], atol=1e-12)
    assert torch.allclose(rejected.sum(), expected[2], atol=1e-12)


def test_ipo_is_minimal_at_a_summed_margin_of_one_over_two_beta():
    ratio = torch.linspace(-10, 10, 401, dtype=torch.float64)
    zero = torch.zeros_like(ratio)
    loss, _, _ = ipo_loss(ratio, zero, zero, zero, 0.1)
    assert ratio[loss.argmin()].item() == pytest.approx(5.0)
    assert loss.min().item() == pytest.approx(0.0, abs=1e-12)
    assert loss[200].item() == pytest.approx(25.0)


@pytest.mark.parametrize("normalise", ["sum", "length"])
def test_dpo_starts_at_exactly_ln_2(batch, normalise):
    policy = tiny().float()
    loss = built(frozen_model=frozen().float(), normalise=normalise).loss(policy.train(), batch)
    exact = -logsigmoid(torch.zeros(PAIRS))
    assert loss.total.item() == exact.sum().item() == pytest.approx(PAIRS * math.log(2))
    assert loss.metrics["margin"].total.item() == 0
    assert loss.metrics["accuracy"].total.item() == 0


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_dpo_starts_at_exactly_ln_2_under_autocast(batch, precision):
    policy, frozen_model = tiny().float(), frozen().float()
    with torch.autocast("cpu", precision):
        loss = built(frozen_model=frozen_model).loss(policy.train(), batch)
    assert loss.total.item() == -logsigmoid(torch.zeros(PAIRS)).sum().item()


def test_the_reference_is_bit_equal_to_the_policy_and_stores_no_graph(batch):
    policy = tiny().float().train()
    with reference_model(policy, frozen().float()) as lm:
        scored, _ = pair_logprobs(lm, batch)
    output, _ = pair_logprobs(policy, batch)
    assert torch.equal(scored.chosen, output.chosen)
    assert not scored.chosen.requires_grad
    assert output.chosen.requires_grad


def test_ipo_and_kto_start_at_the_values_of_their_formulas(batch):
    policy, frozen_model = tiny(), frozen()
    assert built("ipo", frozen_model, beta=0.1).loss(policy, batch).total.item() == PAIRS * 25.0
    assert built("kto", frozen_model).loss(policy, batch).total.item() == PAIRS * 1.0


def test_logprob_sums_cover_exactly_the_completions(batch):
    policy = tiny()
    found, _ = pair_logprobs(policy, batch)
    logits = policy(batch.ids, batch.positions, batch.segments).logits
    each = logprobs.token_logprobs(logits, batch.targets)
    sums = torch.stack([row[kept].sum() for row, kept in zip(each, batch.mask, strict=True)])
    assert torch.allclose(found.chosen, sums[0::2], atol=1e-12)
    assert torch.allclose(found.rejected, sums[1::2], atol=1e-12)
    assert found.chosen_tokens.tolist() == [8, 2, 5]
    assert found.rejected_tokens.tolist() == [4, 6, 3]


@pytest.mark.parametrize("loss", LOSSES)
def test_masked_positions_get_exactly_zero_gradient(loss, batch, monkeypatch):
    policy, hidden = tiny(), []
    forward = LM.forward

    def keeping(self, *args, **more):
        out = forward(self, *args, **more)
        if self is policy:
            out.hidden.retain_grad()
            hidden.append(out.hidden)
        return out

    monkeypatch.setattr(LM, "forward", keeping)
    built(loss, frozen(1)).loss(policy, batch).total.backward()
    (kept,) = hidden
    assert bool((kept.grad[~batch.mask] == 0).all())
    assert bool((kept.grad[batch.mask] != 0).any(-1).all())


@pytest.mark.parametrize("loss", LOSSES)
def test_chunked_loss_and_gradient_equal_the_unchunked(loss, batch, monkeypatch):
    policy, objective = tiny(), built(loss, frozen(1))
    whole, expected = gradients(objective, policy, batch)
    monkeypatch.setattr(chunked_head, "MAX_CHUNK_LOGITS", 120)
    monkeypatch.setattr(chunked_head, "MIN_CHUNK_TOKENS", 1)
    parts, found = gradients(objective, policy, batch)
    assert torch.allclose(parts.total, whole.total, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_T4_splitting_a_batch_changes_no_result(loss, batch):
    policy, objective = tiny(), built(loss, frozen(1))
    whole, expected = gradients(objective, policy, batch)
    policy.zero_grad()
    parts = [objective.loss(policy, part) for part in batch.split(2)]
    assert sum(int(objective.units(part)) for part in batch.split(2)) == PAIRS
    for part in parts:
        part.total.backward()
    found = [p.grad for p in policy.parameters()]
    assert torch.allclose(sum(part.total for part in parts), whole.total, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))


def test_padding_changes_no_result(batch):
    policy, objective = tiny(), built(frozen_model=frozen(1))
    wider = Batch(
        *(
            torch.nn.functional.pad(part, (0, 5), value=-1 if part is batch.segments else 0)
            for part in batch[:5]
        ),
        batch.source,
    )
    one, two = (objective.loss(policy, each).total for each in (batch, wider))
    assert torch.allclose(one, two, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_down_the_gradient_raises_the_margin(loss, batch):
    policy = tiny()
    objective = built(loss, frozen())
    before, slopes = gradients(objective, policy, batch)
    with torch.no_grad():
        for parameter, slope in zip(policy.parameters(), slopes, strict=True):
            parameter -= 1e-4 * slope
    after = objective.loss(policy, batch)
    assert after.total.item() < before.total.item()
    assert after.metrics["margin"].total.item() > before.metrics["margin"].total.item()


def test_losses_without_a_reference_load_no_reference():
    assert DPO(loss="simpo").frozen_models() == DPO(loss="orpo").frozen_models() == {}
    assert DPO().frozen_models() == {"reference": None}
    assert DPO(loss="ipo", reference="runs/x").frozen_models() == {"reference": "runs/x"}


def test_kto_uses_the_drift_of_the_previous_step_and_at_least_zero(batch):
    objective = built("kto", frozen(1))
    means = objective.loss(tiny(), batch).metrics["drift"]
    mean = float(means.total / means.count)
    assert objective.accept_step({"drift": mean})
    assert objective.drift.item() == pytest.approx(max(0.0, mean))
    objective.accept_step({"drift": 1.5})
    assert objective.drift.item() == 1.5
    assert "drift" in objective.state_dict()
    assert (
        objective.loss(tiny(), batch).total.item()
        != built("kto", frozen(1)).loss(tiny(), batch).total.item()
    )


@pytest.mark.parametrize(
    ("settings", "output"),
    [
        ({"beta": 0}, "beta=0"),
        ({"beta": float("nan")}, "beta: Input should be a finite number"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing is for loss=sigmoid"),
        ({"gamma": 1.0}, "gamma is for loss=simpo"),
        ({"loss": "simpo", "reference": "x"}, "has no reference"),
        ({"loss": "orpo", "normalise": "length"}, "leave normalise out"),
        ({"loss": "hinge"}, "loss"),
    ],
)
def test_invalid_settings_are_refused(settings, output):
    with pytest.raises(UserError, match=output):
        parse(ObjectiveConfig, {"kind": "dpo", **settings})


def test_replace_validates_a_config():
    with pytest.raises(ValueError, match="beta"):
        replace(DPO(), beta=-1.0)

"""Divergences against direct sums and TRL, chunked and unchunked."""

import math

import pytest
import torch
from torch.nn import functional as F

from tinsmith.core.parse import parse
from tinsmith.data.loader.batch import Batch
from tinsmith.losses import chunked_head
from tinsmith.losses.divergence import DistillWeights, HeadInputs, summed_divergence
from tinsmith.objectives import ObjectiveConfig
from tinsmith.objectives.kd import KD, generalized_jsd, kd_loss

BETAS = (0.0, 0.3, 0.5, 0.9, 1.0)


@pytest.fixture
def pair():
    """Logits (2, 7, 11) of a student with gradient and of a teacher; a mask; in float64."""
    student = (3 * torch.randn(2, 7, 11, dtype=torch.float64)).requires_grad_()
    teacher = (3 * torch.randn(2, 7, 11, dtype=torch.float64)).requires_grad_()
    return student, teacher, torch.rand(2, 7) > 0.4


def direct(student, teacher, beta, temperature):
    """The divergence of every token by its definition."""
    p, q = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    if beta == 0:
        return (q * (q / p).log()).sum(-1)
    if beta == 1:
        return (p * (p / q).log()).sum(-1)
    m = (1 - beta) * p + beta * q
    return beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("beta", BETAS)
def test_value_and_gradient_equal_the_direct_sum(beta, temperature, pair):
    student, teacher, mask = pair
    found = generalized_jsd(student, teacher, mask, beta, temperature)
    expected = direct(student, teacher.detach(), beta, temperature)[mask].mean()
    assert torch.allclose(found, expected, atol=1e-12)
    (one,) = torch.autograd.grad(5 * found, [student])
    (two,) = torch.autograd.grad(5 * expected, [student])
    assert torch.allclose(one, two, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_generalized_jsd_equals_trl(beta, pair, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    student, teacher, mask = pair
    labels = torch.where(mask, 0, -100)
    for temperature in (0.7, 1.0, 2.0):
        theirs = trainer.generalized_jsd_loss(
            student, teacher.detach(), labels, beta=beta, temperature=temperature
        )
        ours = generalized_jsd(student, teacher, mask, beta, temperature)
        assert torch.allclose(ours, theirs, atol=1e-12)
        (one,) = torch.autograd.grad(ours, [student])
        (two,) = torch.autograd.grad(theirs, [student])
        assert torch.allclose(one, two, atol=1e-12)


def test_kd_loss_equals_the_forward_kl_times_the_squared_temperature(pair):
    student, teacher, mask = pair
    found = kd_loss(student, teacher, mask, 2.5)
    assert torch.allclose(found, 2.5**2 * generalized_jsd(student, teacher, mask, 0.0, 2.5))
    expected = F.kl_div(
        (student / 2.5).log_softmax(-1)[mask],
        (teacher / 2.5).softmax(-1)[mask],
        reduction="batchmean",
    )
    assert torch.allclose(found, 6.25 * expected, atol=1e-12)


def test_a_float_mask_gives_a_weighted_mean(pair):
    student, teacher, mask = pair
    weights = mask * torch.rand(2, 7, dtype=torch.float64)
    each = direct(student, teacher, 0.0, 1.0)
    found = kd_loss(student, teacher, weights, 1.0)
    assert torch.allclose(found, (each * weights).sum() / weights.sum(), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", BETAS)
def test_teacher_equal_to_student_gives_exactly_zero_loss_and_gradient(beta, dtype):
    logits = (10 * torch.randn(3, 5, 40)).to(dtype).requires_grad_()
    loss = generalized_jsd(logits, logits.detach().clone(), torch.ones(3, 5), beta, 0.7)
    (grad,) = torch.autograd.grad(loss, [logits])
    assert loss.item() == 0
    assert bool((grad == 0).all())


def test_only_the_student_gets_a_gradient_and_masked_positions_exactly_none(pair):
    student, teacher, mask = pair
    kd_loss(student, teacher, mask, 2.0).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert bool((student.grad[~mask] == 0).all())
    assert bool((student.grad[mask] != 0).any(-1).all())


def test_values_at_masked_positions_have_no_effect(pair):
    student, teacher, mask = pair
    spoilt = torch.where(mask[..., None], student.detach(), math.nan).requires_grad_()
    loss = generalized_jsd(spoilt, teacher, mask, 0.5, 1.0)
    loss.backward()
    assert torch.equal(loss, generalized_jsd(student, teacher, mask, 0.5, 1.0))
    assert bool((spoilt.grad[~mask] == 0).all())


def test_no_positions_give_zero(pair):
    student, teacher, mask = pair
    loss = kd_loss(student, teacher, mask & False, 2.0)
    loss.backward()
    assert loss.item() == 0
    assert bool((student.grad == 0).all())


@pytest.mark.parametrize("beta", BETAS)
def test_very_different_logits_give_finite_values(beta):
    student = torch.tensor([[[200.0, 0.0, -300.0]]], requires_grad=True)
    teacher = torch.tensor([[[-300.0, 0.0, 200.0]]])
    loss = generalized_jsd(student, teacher, torch.ones(1, 1), beta, 1.0)
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(student.grad).all())


def test_half_precision_logits_are_computed_in_float32(pair):
    student, teacher, mask = (part.detach() for part in pair)
    low = generalized_jsd(student.bfloat16(), teacher.bfloat16(), mask, 0.5, 1.0)
    rounded = (student.bfloat16().double(), teacher.bfloat16().double())
    assert low.dtype == torch.float32
    assert torch.allclose(low.double(), generalized_jsd(*rounded, mask, 0.5, 1.0), atol=1e-6)


def test_invalid_values_and_shapes_are_refused_in_one_line(pair):
    student, teacher, mask = pair
    with pytest.raises(ValueError, match=r"beta=1\.5 must be from 0 to 1"):
        generalized_jsd(student, teacher, mask, 1.5, 1.0)
    with pytest.raises(ValueError, match="temperature=0 must be a number above 0"):
        kd_loss(student, teacher, mask, 0)
    with pytest.raises(ValueError, match=r"must be of one shape"):
        kd_loss(student, teacher[..., :-1], mask, 1.0)


@pytest.fixture
def heads(monkeypatch):
    """Hidden states of a student and a teacher of different widths, 20 tokens in chunks of six."""
    monkeypatch.setattr(chunked_head, "MAX_CHUNK_LOGITS", 300)
    monkeypatch.setattr(chunked_head, "MIN_CHUNK_TOKENS", 1)

    def reported(width: int) -> HeadInputs:
        hidden = torch.randn(20, width, dtype=torch.float64, requires_grad=True)
        return HeadInputs(hidden, torch.randn(50, width, dtype=torch.float64, requires_grad=True))

    return (
        reported(16),
        reported(24),
        torch.randint(0, 50, (20,)),
        torch.rand(20, dtype=torch.float64),
    )


@pytest.mark.parametrize("hard", [0.0, 0.4])
@pytest.mark.parametrize("beta", BETAS)
def test_chunked_sum_and_gradients_equal_the_unchunked(beta, hard, heads):
    student, teacher, targets, weights = heads
    total, seen = summed_divergence(
        student, teacher, targets, weights, DistillWeights(beta, 1.7, 2.0, hard)
    )
    logits = student.hidden_ND @ student.weight_VD.T
    taught = (teacher.hidden_ND @ teacher.weight_VD.T).detach()
    apart = direct(logits, taught, beta, 1.7)
    nll = F.cross_entropy(logits, targets, reduction="none")
    whole = ((1 - hard) * 2.0 * apart + hard * nll) @ weights
    assert torch.allclose(total, whole, atol=1e-10)
    assert torch.allclose(seen, torch.stack((apart @ weights, nll @ weights)), atol=1e-10)
    assert not seen.requires_grad
    found = torch.autograd.grad(3 * total, list(student))
    expected = torch.autograd.grad(3 * whole, list(student))
    for one, two in zip(found, expected, strict=True):
        assert torch.allclose(one, two, atol=1e-10)


def test_no_tensor_of_tokens_by_vocabulary_is_saved_for_backward(heads):
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        summed_divergence(*heads, DistillWeights(0.5, 1.0))
    student = heads[0]
    assert saved
    assert max(saved) <= max(student.hidden_ND.numel(), student.weight_VD.numel())


def batch(mask: torch.Tensor) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 24, (2, 13), generator=generator)
    positions = torch.arange(12).expand(2, 12)
    return Batch(ids[:, :-1], ids[:, 1:], mask, positions, positions * 0, torch.zeros(2).long())


def objective(teacher, **keys):
    made = KD(teacher="somewhere", **keys).build()
    made.frozen_models = {"teacher": teacher.eval().requires_grad_(False)}
    return made


@pytest.mark.parametrize(
    "keys", [{}, {"loss": "reverse"}, {"loss": "jsd", "beta": 0.2}, {"temperature": 2.0}]
)
def test_a_student_equal_to_its_teacher_has_no_gradient(keys, small):
    """Up to the last bits in which attention with and without gradients differs."""
    student = small()
    loss = objective(small(), **keys).loss(student, batch(torch.ones(2, 12, dtype=torch.bool)))
    loss.total.backward()
    assert abs(loss.total.item()) < 1e-12
    assert all(bool((p.grad.abs() < 1e-12).all()) for p in student.parameters())


def test_the_objective_is_kd_loss_and_cross_entropy_over_masked_in_targets(small):
    student, teacher = small(), small(dim=48, depth=1)
    mask = torch.rand(2, 12) > 0.5
    requested = objective(teacher, temperature=1.5, ce_weight=0.5)
    given = batch(mask)
    found = requested.loss(student, given)
    logits = student(given.ids, given.positions, given.segments).logits
    taught = teacher(given.ids, given.positions, given.segments).logits
    nll = F.cross_entropy(logits[mask], given.targets[mask])
    mean = 0.5 * kd_loss(logits, taught, mask, 1.5) + 0.5 * nll
    assert torch.allclose(found.total / requested.units(given), mean, atol=1e-10)
    means = {name: float(m.total / m.count) for name, m in found.metrics.items()}
    assert means["loss"] == pytest.approx(mean.item())
    assert means["divergence"] == pytest.approx(kd_loss(logits, taught, mask, 1.5).item() / 2.25)
    assert means["nll"] == pytest.approx(nll.item())
    found.total.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_teacher_and_student_run_in_the_same_precision_and_the_teacher_without_gradients(small):
    student, teacher = small(dtype=torch.float32), small(dtype=torch.float32)
    seen = []
    for lm in (teacher, student):
        lm.blocks[0].feed.down_proj.register_forward_hook(
            lambda module, given, y: seen.append((y.dtype, y.requires_grad, module.training))
        )
    with torch.autocast("cpu", torch.bfloat16):
        objective(teacher).loss(student, batch(torch.ones(2, 12) > 0))
    assert seen == [(torch.bfloat16, False, False), (torch.bfloat16, True, True)]


def test_splitting_a_batch_changes_no_gradient(small):
    teacher, mask = small(dim=48), torch.rand(2, 12) > 0.5
    requested, given = objective(teacher, ce_weight=0.3), batch(mask)
    grads = []
    for parts in ([given], given.split(1)):
        student = small()
        for part in parts:
            requested.loss(student, part).total.backward()
        grads.append([parameter.grad for parameter in student.parameters()])
    for one, two in zip(*grads, strict=True):
        assert torch.allclose(one, two, atol=1e-10)


@pytest.mark.parametrize(
    ("keys", "output"),
    [
        ({}, "teacher"),
        ({"teacher": "x", "temperature": 0}, "temperature=0.0 must be a number above 0"),
        ({"teacher": "x", "ce_weight": 1}, "ce_weight=1.0 must be at least 0 and below 1"),
        ({"teacher": "x", "beta": 0.5}, "beta=0.5 must be above 0 and below 1, with loss: jsd"),
        ({"teacher": "x", "loss": "jsd", "beta": 2}, "beta=2.0 must be from 0 to 1"),
        ({"teacher": "x", "weights": {"think": 0}}, "think=0.0 must be a number above 0"),
        ({"teacher": "x", "teacher_weights": "int4"}, "teacher_weights"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(keys, output):
    with pytest.raises(Exception, match=output) as refused:
        parse(ObjectiveConfig, {"kind": "kd"} | keys, "objective")
    assert "\n" not in str(refused.value)

"""Reward modeling: the loss, the tokens that the score reads, and use as a reward."""

import math

import pytest
import torch

from tinsmith.core.errors import UserError
from tinsmith.core.parse import parse
from tinsmith.data.loader.batch import Batch
from tinsmith.losses.preference import bradley_terry_loss
from tinsmith.nn.config import Layer, ModelConfig
from tinsmith.nn.feedforwards import SwiGLU
from tinsmith.nn.mixers import GQA
from tinsmith.nn.model import LM
from tinsmith.objectives import ObjectiveConfig
from tinsmith.objectives.reward import RewardModeling
from tinsmith.rewards.model import RewardModel

LENGTHS = (9, 6, 4, 8)


@pytest.fixture
def lm():
    layer = Layer(mixer=GQA(heads=2), feed_forward=SwiGLU(hidden_dim=24))
    return LM(
        ModelConfig(vocab_size=40, dim=16, depth=2, max_seq_len=32, pattern=(layer,))
    ).double()


@pytest.fixture
def batch():
    """Two pairs, rows of 9, 6, 4 and 8 ids."""
    place = torch.arange(9).expand(4, 9)
    real = place < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(3, 40, (4, 9)).where(real, 0)
    learned = real & (place >= 2) & (place < torch.tensor(LENGTHS)[:, None] - 1)
    return Batch(
        ids,
        torch.roll(ids, -1, 1).where(learned, 0),
        learned,
        place.where(real, 0),
        torch.zeros_like(place).where(real, -1),
        torch.zeros(4, dtype=torch.long),
    )


@pytest.fixture
def objective(lm):
    made = RewardModeling().build()
    made.prepare(lm, None)
    return made.double()


def rows_of(batch):
    return [row[:length].tolist() for row, length in zip(batch.ids, LENGTHS, strict=True)]


def test_the_loss_equals_bradley_terry():
    chosen, rejected = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 3.0]).double()
    won = [1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(5.0))]
    found = bradley_terry_loss(chosen, rejected, 0.1)
    expected = [-math.log(won[0]) + 0.1 * 1.5**2, -math.log(won[1]) + 0.1 * 1.0]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_training_starts_at_exactly_ln_2(lm, objective, batch):
    loss = objective.loss(lm, batch)
    assert loss.total.item() / 2 == math.log(2)
    assert int(objective.units(batch)) == 2
    assert loss.metrics["accuracy"].total.item() == 0


def test_the_score_reads_the_last_token_of_the_completion_and_no_padding(lm, objective, batch):
    with torch.no_grad():
        objective.head.weight.normal_()
    scores = objective.head(
        torch.stack([lm(torch.tensor([row]), logits=False).hidden[0, -1] for row in rows_of(batch)])
    )
    loss = objective.loss(lm, batch)
    assert torch.allclose(loss.metrics["chosen_score"].total, scores[0::2].sum(), atol=1e-12)
    assert torch.allclose(loss.metrics["rejected_score"].total, scores[1::2].sum(), atol=1e-12)
    padded = batch._replace(ids=batch.ids.where(batch.segments >= 0, 7))
    assert torch.allclose(objective.loss(lm, padded).total, loss.total, atol=1e-12)
    changed = batch.ids.clone()
    changed[0, 8] = 3 + (changed[0, 8] - 2) % 37
    other = objective.loss(lm, batch._replace(ids=changed))
    assert abs(other.total.item() - loss.total.item()) > 1e-6


def test_head_and_model_have_gradients(lm, objective, batch):
    parameters = [*objective.parameters(), *lm.blocks.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.01)
    for _ in range(10):
        optimizer.zero_grad()
        objective.loss(lm, batch).total.backward()
        optimizer.step()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in parameters)
    after = objective.loss(lm, batch)
    assert after.total.item() / 2 < 0.5
    assert after.metrics["accuracy"].total.item() == 2


def test_T4_splitting_a_batch_changes_no_result(lm, objective, batch):
    with torch.no_grad():
        objective.head.weight.normal_()
    whole = objective.loss(lm, batch).total
    parts = sum(objective.loss(lm, part).total for part in batch.split(2))
    assert torch.allclose(parts, whole, atol=1e-12)


def test_a_reward_model_gives_the_scores_of_training(lm, objective, batch):
    with torch.no_grad():
        objective.head.weight.normal_()
    scorer = RewardModel(lm.eval(), objective.head.weight.detach()).double()
    found = scorer.score(rows_of(batch))
    loss = objective.loss(lm, batch)
    assert torch.allclose(found[0::2].sum(), loss.metrics["chosen_score"].total, atol=1e-12)
    alone = torch.cat([scorer.score([row]) for row in rows_of(batch)])
    assert torch.allclose(found, alone, atol=1e-12)


def test_a_head_of_another_width_is_refused(lm):
    with pytest.raises(UserError, match="the model is 16 wide"):
        RewardModel(lm, torch.zeros(1, 8))


def test_a_negative_center_is_refused():
    with pytest.raises(UserError, match="center=-1"):
        parse(ObjectiveConfig, {"kind": "reward", "center": -1})

"""Weights of tags: exactly the tags are weighted, and the loss is divided by the sum of weights."""

import pytest
import torch

from tinsmith.data.loader.batch import Batch
from tinsmith.objectives.kd import KD
from tinsmith.objectives.sft import SFT
from tinsmith.objectives.token_weights import TagWeights, TokenWeights
from tinsmith.text.bpe import train_bpe
from tinsmith.text.chat import encode_chat, parse_conversation

WEIGHTS = {"think": 10.0, "answer": 7.0}
ANSWER = "<answer>x < y, and </ think> or <thin k> are no tags</answer>"


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["think answer < > </think> and <answer> more text"] * 3, 330)


def encoded(tokenizer) -> Batch:
    """One chat whose user writes tags too, as a row."""
    chat = {
        "messages": [
            {"role": "user", "content": "say <think> and </answer>, 1 < 2"},
            {"role": "assistant", "reasoning_content": "1 < 2 > 0", "content": ANSWER},
        ]
    }
    ids, mask = encode_chat(tokenizer, parse_conversation(chat))
    whole, counted = torch.tensor([ids]), torch.tensor([mask])
    where = torch.arange(len(ids) - 1)[None]
    targets = torch.where(counted, whole, 0)[:, 1:]
    return Batch(whole[:, :-1], targets, counted[:, 1:], where, where * 0, torch.zeros(1).long())


def tags(tokenizer) -> TokenWeights:
    made = TokenWeights(TagWeights(**WEIGHTS))
    made.prepare(tokenizer)
    return made


def test_exactly_the_assistants_tags_have_weights(tokenizer):
    batch = encoded(tokenizer)
    weights = tags(tokenizer)(batch)
    heavy = [tokenizer.decode([number]) for number in batch.targets[weights > 1].tolist()]
    assert heavy == ["<think>", "</think>", "<answer>", "</answer>"]
    assert weights[weights > 1].tolist() == [10.0, 10.0, 7.0, 7.0]


def test_a_tag_is_one_id_and_similar_text_is_not(tokenizer):
    for name in WEIGHTS:
        for tag in (f"<{name}>", f"</{name}>"):
            assert tokenizer.special(tag) not in tokenizer.encode(f"x{tag} y {tag}")


def test_weights_multiply_only_the_mask(tokenizer):
    batch = encoded(tokenizer)
    weights = tags(tokenizer)(batch)
    assert bool((weights[~batch.mask] == 0).all())
    assert int((weights == 1).sum()) == int(batch.mask.sum()) - 4
    masked = batch._replace(mask=torch.zeros_like(batch.mask))
    assert bool((tags(tokenizer)(masked) == 0).all())
    assert torch.equal(TokenWeights(TagWeights())(batch), batch.mask.float())


@pytest.mark.parametrize("kind", ["sft", "kd"])
def test_the_loss_is_the_weighted_mean(kind, tokenizer, small):
    weights = TagWeights(**WEIGHTS)
    if kind == "sft":
        objective = SFT(weights=weights).build()
    else:
        objective = KD(teacher="x", ce_weight=0.5, weights=weights).build()
        objective.frozen_models = {"teacher": small(vocab_size=330, dim=48).eval()}
    policy = small(vocab_size=330)
    objective.prepare(policy, tokenizer)
    batch = encoded(tokenizer)
    found = objective.loss(policy, batch)
    each = tags(tokenizer)(batch)
    assert objective.units(batch) == each.sum()
    logits = policy(batch.ids).logits[0].log_softmax(-1)
    nll = -logits.gather(1, batch.targets[0, :, None])[:, 0]
    expected = (nll * each[0]).sum() / each.sum()
    if kind == "kd":
        taught = objective.frozen_models["teacher"](batch.ids).logits[0].log_softmax(-1)
        apart = (taught.exp() * (taught - logits)).sum(-1)
        expected = 0.5 * expected + 0.5 * (apart * each[0]).sum() / each.sum()
    assert torch.allclose(found.total / objective.units(batch), expected, atol=1e-10)

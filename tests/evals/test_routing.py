"""Specialisation of experts: planted routing against counts by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tinsmith.core.errors import UserError
from tinsmith.data.loader.batch import Row, collate
from tinsmith.evals.routing import (
    TOKEN_CLASSES,
    Specialisation,
    evaluate_routing,
    jaccard_distance,
    mutual_information,
    token_classes,
)
from tinsmith.hub.hf import write_folder
from tinsmith.nn.contract import FeedForward, Out, Routed
from tinsmith.verbs.evaluate import EvalOptions, evaluate


class Planted(FeedForward, Routed):
    """Experts by token id, where the input is the token's one-hot embedding."""

    def __init__(self, experts_VE):
        super().__init__()
        self.experts_VE = experts_VE

    def forward(self, x, ctx):
        return Out(torch.zeros_like(x))

    def expert_mask(self, x, ctx):
        return self.experts_VE[x.argmax(-1)] & (ctx.segments >= 0)[..., None]


class Rows:
    """Rows of several sources, as an evaluation asks for them."""

    names = ("tales", "code")

    def __init__(self, rows, sources):
        self.all_rows, self.sources = rows, sources

    def subset(self, name):
        number = self.names.index(name)
        mine = [i for i, source in enumerate(self.sources) if source == number]
        return Rows([self.all_rows[i] for i in mine], [number] * len(mine))

    def get_batch(self, start, count):
        stop = start + count
        return collate(self.all_rows[start:stop], self.sources[start:stop])

    def iter_batches(self, batch_size, max_samples):
        for start in range(0, min(max_samples, len(self.all_rows)), batch_size):
            yield self.get_batch(start, min(batch_size, max_samples - start))


@pytest.fixture
def source(tokenizer):
    """Six rows of ten tokens and three of padding; `tales` has low ids, `code` any."""
    drawn = np.random.default_rng(3)
    rows, sources = [], [0, 1, 0, 1, 1, 0]
    for number in sources:
        ids = drawn.integers(0, 100 if number == 0 else tokenizer.vocab_size, 13)
        segments = np.repeat([0, -1], [10, 3])
        positions = np.where(segments == 0, np.arange(13), 0)
        mask = segments == 0
        rows.append(Row(ids, np.zeros_like(ids), mask, positions, segments))
    return Rows(rows, sources)


@pytest.fixture
def planted(bigrams, tokenizer):
    """(experts of every id (V, E) bool, ...) -> a model whose layers choose so."""

    def made(*tables):
        lm = bigrams([])
        for block, table in zip(lm.blocks, tables, strict=False):
            block.feed = Planted(table)
            nn.init.ones_(block.feed_norm.weight)
        return lm

    return made


def measure(lm, source, classes_V, *, rows=99, poll=lambda: None):
    return evaluate_routing(
        lm, source, classes_V, max_samples=rows, batch_size=2, device="cpu", poll=poll
    )


def one_hot(experts_V):
    return nn.functional.one_hot(experts_V).bool()


def test_mutual_information_of_simple_tables():
    assert mutual_information(torch.ones(3, 4)) == pytest.approx(0, abs=1e-12)
    assert mutual_information(torch.tensor([[1.0], [3.0]]) @ torch.tensor([[2.0, 5.0]])) < 1e-12
    assert mutual_information(7 * torch.eye(8)) == pytest.approx(3)
    assert mutual_information(torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]])) == pytest.approx(1)
    table = torch.tensor([[3.0, 1], [1, 3]])
    assert mutual_information(table) == pytest.approx(1 + 0.75 * math.log2(0.75) + 0.25 * -2)
    assert mutual_information(table[:, :1]) == 0
    drawn = torch.rand(5, 9, generator=torch.Generator().manual_seed(0))
    assert mutual_information(drawn) == pytest.approx(mutual_information(drawn.mT))
    assert mutual_information(drawn) == pytest.approx(mutual_information(1000 * drawn))


def test_jaccard_distance_of_simple_sets():
    assert jaccard_distance(torch.tensor([[9.0, 9, 1, 1], [8, 8, 0, 0]])) == 0
    assert jaccard_distance(torch.tensor([[9.0, 9, 1, 1], [1, 1, 7, 7]])) == 1
    shared = torch.tensor([[9.0, 9, 1, 1], [1, 9, 9, 1]])
    assert jaccard_distance(shared) == pytest.approx(1 - 1 / 3)
    three = torch.cat((shared, torch.tensor([[9.0, 9, 0, 0]])))
    assert jaccard_distance(three) == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
    assert jaccard_distance(torch.cat((three, torch.zeros(1, 4)))) == jaccard_distance(three)
    assert jaccard_distance(shared[:1]) is None
    assert jaccard_distance(torch.ones(2, 4)) == 0


def test_experts_equal_to_classes_carry_all_information_and_one_expert_none(
    planted, source, tokenizer
):
    classes = torch.arange(tokenizer.vocab_size) % 3
    lm = planted(one_hot(classes), torch.ones(tokenizer.vocab_size, 5, dtype=torch.bool))
    found = measure(lm, source, classes)
    assert set(found) == {"0.feed", "1.feed", "all"}
    sure, blind = found["0.feed"], found["1.feed"]
    assert sure.mutual_information == pytest.approx(sure.class_entropy)
    assert sure.normalized_mi == pytest.approx(1)
    assert (blind.mutual_information, blind.jaccard) == (pytest.approx(0, abs=1e-12), 0)
    assert found["all"].mutual_information == pytest.approx(sure.mutual_information / 2)


def test_counts_equal_a_plain_loop_without_padding(planted, source, tokenizer):
    generator = torch.Generator().manual_seed(4)
    table = torch.rand(tokenizer.vocab_size, 6, generator=generator) < 0.4
    classes = torch.randint(0, 4, (tokenizer.vocab_size,), generator=generator)
    by_class, by_source = torch.zeros(4, 6), torch.zeros(2, 6)
    for row, number in zip(source.all_rows, source.sources, strict=True):
        for token, segment in zip(row.ids, row.segments, strict=True):
            if segment >= 0:
                by_class[classes[token]] += table[token]
                by_source[number] += table[token]
    found = measure(planted(table), source, classes)["0.feed"]
    assert found.mutual_information == pytest.approx(mutual_information(by_class))
    shares = by_class.sum(1) / by_class.sum()
    assert found.class_entropy == pytest.approx(-float((shares * shares.log2()).sum()))
    assert found.jaccard == jaccard_distance(by_source)
    part = measure(planted(table), source, classes, rows=2)["0.feed"]
    assert part.mutual_information != pytest.approx(found.mutual_information)


def test_sources_with_disjoint_experts_have_distance_one(planted, source, tokenizer):
    lm = planted(one_hot((torch.arange(tokenizer.vocab_size) < 100).long()))
    only_high = [row for row, number in zip(source.all_rows, source.sources, strict=True) if number]
    for row in only_high:
        row.ids[:] = np.maximum(row.ids, 100)
    classes = torch.zeros(tokenizer.vocab_size, dtype=torch.long)
    found = measure(lm, source, classes)["0.feed"]
    assert found.jaccard == 1
    assert math.isnan(found.normalized_mi), "one class: there is nothing to tell"


def test_a_layer_that_routed_nothing_gives_nan(planted, source, tokenizer):
    classes = torch.arange(tokenizer.vocab_size) % 3
    unselected = torch.zeros(tokenizer.vocab_size, 4, dtype=torch.bool)
    found = measure(planted(unselected, one_hot(classes)), source, classes)
    assert math.isnan(found["0.feed"].mutual_information)
    assert found["all"] == found["1.feed"]
    assert math.isnan(measure(planted(unselected), source, classes)["all"].mutual_information)


def test_a_model_without_experts_gives_no_results(make_lm, source, tokenizer):
    assert measure(make_lm(), source, token_classes(tokenizer)) == {}


@pytest.fixture
def routed(make_lm):
    feed = {"kind": "topk_moe", "experts": 4, "top_k": 2, "hidden_dim": 8}
    mixer = {"kind": "dyn_heads", "heads": 4, "experts": 3}
    return make_lm(pattern=[{"mixer": mixer, "feed_forward": feed}])


def test_the_model_is_restored_even_if_interrupted(routed, source, tokenizer):
    calls = []

    def poll():
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt

    modes = [module.training for module in routed.modules()]
    state = torch.random.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        measure(routed, source, token_classes(tokenizer), poll=poll)
    assert [module.training for module in routed.modules()] == modes
    assert not any(module._forward_pre_hooks for module in routed.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_compiled_model_gives_the_same_results(routed, source, tokenizer):
    classes = token_classes(tokenizer)
    expected = measure(routed, source, classes)
    assert set(expected) == {"0.mixer", "0.feed", "1.mixer", "1.feed", "all"}
    routed.compile(backend="eager")
    routed(torch.zeros(1, 5, dtype=torch.long))
    assert measure(routed, source, classes) == expected
    assert expected["all"].mutual_information > 0


@pytest.mark.parametrize(
    "feed",
    [
        {"kind": "topk_moe", "experts": 4, "top_k": 2, "hidden_dim": 8},
        {"kind": "deepseek_moe", "experts": 6, "top_k": 2, "hidden_dim": 8, "n_group": 3},
        {"kind": "dyn_moe", "experts": 4, "hidden_dim": 8},
    ],
    ids=lambda feed: feed["kind"],
)
def test_expert_masks_agree_with_reported_loads(feed, make_lm):
    """The mask of selected experts and the reported load agree; padding is in neither."""
    mixer = {"kind": "dyn_lora", "base": {"kind": "gqa", "heads": 4}, "experts": 3}
    lm = make_lm(pattern=[{"mixer": mixer, "feed_forward": feed}]).eval()
    segments = torch.tensor([[0] * 7 + [-1] * 3, [-1] * 2 + [0] * 3 + [1] * 5])
    ids = torch.arange(20).view(2, 10)
    found = {}

    def attach(name, part):
        return lambda module, given: found.update({name: part.expert_mask(*given[:2])})

    for name, part in lm.routed_modules().items():
        part.register_forward_pre_hook(attach(name, part))
    stats = lm(ids, segments=segments).stats
    assert set(found) == {"0.mixer", "0.feed", "1.mixer", "1.feed"}
    for name, chosen in found.items():
        assert not chosen[segments < 0].any()
        load = stats[f"{name}.load"]
        fallback = stats.get(f"{name}.fallback", torch.tensor(0)) if "feed" in name else 0
        assert (chosen.sum((0, 1)) >= load).all()
        assert chosen.sum() == load.sum() + fallback


def test_token_classes(tokenizer):
    classes = token_classes(tokenizer)
    assert len(classes) == tokenizer.vocab_size
    named = {
        "the": "letters",
        " the": "letters",
        "7": "digits",
        " ": "white space",
        "\n": "white space",
        ".": "punctuation",
        "<|endoftext|>": "special",
    }
    for text, name in named.items():
        (number,) = [tokenizer.special(text)] if name == "special" else tokenizer.encode(text)[:1]
        assert TOKEN_CLASSES[int(classes[number])] == name, text
    half = tokenizer.encode("é".encode()[:1])
    assert TOKEN_CLASSES[int(classes[half[0]])] == "other"


def test_the_command_refuses_what_it_cannot_evaluate(make_lm, tokenizer, tmp_path):
    assert str(Specialisation(0.25, 2.0, 0.5)).endswith("jaccard 0.50 between tasks")
    assert "jaccard" not in Specialisation(0.25, 2.0, None).to_dict()
    lm = make_lm().float()
    write_folder(lm.config, lm.state_dict(), tokenizer, tmp_path / "m")
    with pytest.raises(UserError, match="validation split of a run"):
        evaluate(str(tmp_path / "m"), "routing", EvalOptions(None, None, None), "cpu", None, False)

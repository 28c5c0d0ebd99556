"""EAVI: excursions, alignment, and its relation to teacher forcing."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tinsmith.core.errors import UserError
from tinsmith.data.arc.encoding import ArcExample, encode_example
from tinsmith.data.arc.generators import Sizes, generate_puzzle
from tinsmith.data.loader.batch import Batch, Row, collate
from tinsmith.losses.logprobs import token_nll
from tinsmith.nn.model import LM, ModelOut
from tinsmith.objectives.eavi import (
    EAVI,
    MAX_VOCAB_SIZE,
    AnswerSpan,
    excursion,
    last_answer_span,
    splice_excursion,
)
from tinsmith.objectives.sft import SFT
from tinsmith.text.grid_vocab import grid_tokenizer
from tinsmith.text.tokenizer import Tokenizer

VOCAB = 18
NSA = {
    **{"kind": "nsa", "heads": 4, "kv_heads": 2, "compress_block": 4, "compress_stride": 2},
    **{"select_block": 4, "select_count": 2, "window": 6},
}
DYN_MOE = {"kind": "dyn_moe", "experts": 4, "hidden_dim": 16, "target_active": 2, "sdl_weight": 0.1}
GQA = {"kind": "gqa", "heads": 4, "kv_heads": 2}
SWIGLU = {"kind": "swiglu", "hidden_dim": 48}
MODELS = {
    "dense": {"mixer": GQA, "feed_forward": SWIGLU},
    "minutes": {"mixer": NSA, "feed_forward": DYN_MOE},
}
"""A dense model, and the model of the minutes."""


@pytest.fixture(params=MODELS)
def lm(small, request) -> LM:
    made = small(vocab_size=VOCAB, pattern=[MODELS[request.param]], tie_embeddings=True)
    return made


def batch_of(rules=("mirror", "half", "recolour", "count"), every=True) -> Batch:
    """One task of each rule, of different lengths."""
    rows = []
    for number, rule in enumerate(rules):
        puzzle = generate_puzzle(rule, 0, number, Sizes(3, 4, 1))
        ids, mask = encode_example(ArcExample(puzzle, every))
        given, learned = np.array(ids), np.array([*mask[1:], False])
        follows = np.append(given[1:], 0)
        places, nowhere = np.arange(len(given)), np.zeros_like(given)
        rows.append(Row(given, np.where(learned, follows, 0), learned, places, nowhere))
    return collate(rows, [0] * len(rows))


def ready(**settings: Any) -> Any:
    objective = EAVI(**settings).build()
    objective.prepare(cast(LM, None), grid_tokenizer())
    return objective


def alone(lm: LM, batch: Batch, span: AnswerSpan, output, row: int):
    """Logits of one unpadded row after an excursion, at the answer's positions."""
    length = int((batch.segments[row] >= 0).sum())
    ids = F.one_hot(batch.ids[row : row + 1, :length], VOCAB).double()
    start, count = int(span.opener_B[row]), int(span.length_B[row])
    ids[0, start + 1 : start + count] = output[row, : count - 1]
    return lm(ids).logits[0, start : start + count]


def one_hot(batch: Batch, span: AnswerSpan):
    """Excursions that say the truth."""
    output = torch.zeros(len(batch.ids), int(span.length_B.max()), VOCAB, dtype=torch.float64)
    for row, (start, count) in enumerate(zip(*map(torch.Tensor.tolist, span), strict=True)):
        targets = batch.targets[row, start : start + count]
        output[row, :count] = F.one_hot(targets, VOCAB).double()
    return output


def gradients(lm: LM, loss):
    lm.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}


def test_the_answer_is_the_last_run_of_targets():
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0, 1], [1] * 8]).bool()
    span = last_answer_span(mask)
    assert span.opener_B.tolist() == [4, 7, 0]
    assert span.length_B.tolist() == [3, 1, 8]
    assert span.target_mask(mask).int().tolist()[0] == [0, 0, 0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("hard", [False, True])
def test_EAVI1_an_excursion_equals_one_parallel_forward_after_it(lm, hard):
    batch = batch_of()
    span = last_answer_span(batch.mask)
    output = excursion(lm, batch.ids, span, temperature=0.7, hard=hard)
    true = F.one_hot(batch.ids, VOCAB).double()
    with torch.no_grad():
        logits = lm.eval()(
            splice_excursion(true, span, output), batch.positions, batch.segments
        ).logits
        for row, count in enumerate(span.length_B.tolist()):
            start = int(span.opener_B[row])
            whole = logits[row, start : start + count]
            torch.testing.assert_close(
                whole, alone(lm, batch, span, output, row), rtol=0, atol=1e-10
            )
            if hard:
                assert torch.equal(whole.argmax(-1), output[row, :count].argmax(-1))
                assert set(output[row, :count].flatten().tolist()) == {0.0, 1.0}
            else:
                expected = (whole / 0.7).softmax(-1)
                torch.testing.assert_close(output[row, :count], expected, rtol=0, atol=1e-12)
            assert not output[row, count:].any()


def test_EAVI2_an_excursion_equal_to_the_truth_is_teacher_forcing_to_the_bit(lm):
    batch = batch_of()
    span = last_answer_span(batch.mask)
    found = ready().loss_given_excursion(lm, batch, span, one_hot(batch, span))
    teacher, align = found.metrics["teacher_forcing_loss"], found.metrics["alignment_loss"]
    assert teacher.total == align.total
    assert teacher.count == align.count == span.length_B.sum()
    true = F.one_hot(batch.ids, VOCAB).double()
    assert torch.equal(splice_excursion(true, span, one_hot(batch, span)), true)


def frozen_loss(lm, batch, span, output):
    """L_align of the equation, by rows: nats of the true answers after the excursion."""
    total = torch.zeros((), dtype=torch.float64)
    for row, (start, count) in enumerate(zip(*map(torch.Tensor.tolist, span), strict=True)):
        logprobs = alone(lm, batch, span, output, row).log_softmax(-1)
        targets = batch.targets[row, start : start + count]
        total = total - logprobs.gather(1, targets[:, None]).sum()
    return total


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_equals_the_formula_row_by_row(small, share):
    lm = small(vocab_size=VOCAB, pattern=[MODELS["dense"]])
    batch = batch_of(every=False)
    span = last_answer_span(batch.mask)
    output = excursion(lm, batch.ids, span, temperature=1.0, hard=False)
    found = ready(alignment_weight=share).loss(lm, batch)
    taught = frozen_loss(lm, batch, span, one_hot(batch, span))
    expected = (1 - share) * taught + share * frozen_loss(lm, batch, span, output)
    torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=0)
    assert ready().units(batch) == span.length_B.sum()
    mine, theirs = gradients(lm, found.total), gradients(lm, expected)
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["blocks.0.mixer.q_proj.weight", "embed.weight"])
def test_EAVI3_the_gradient_treats_the_excursion_as_constant(small, name):
    """The bias that the docstring tells of, seen by finite differences; of the tied embedding, by
    which what was said is read, too.
    """
    lm = small(vocab_size=VOCAB, pattern=[MODELS["dense"]], tie_embeddings=True)
    batch = batch_of(("mirror",), every=False)
    span = last_answer_span(batch.mask)

    def output():
        return excursion(lm, batch.ids, span, temperature=1.0, hard=False)

    objective, start = ready(alignment_weight=1.0), output()
    weight = lm.get_parameter(name)
    gradient = gradients(lm, objective.loss(lm, batch).total)[name]
    direction = torch.randn_like(weight)
    exact = float((gradient * direction).sum())

    def difference(excursed, step=1e-5):
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(sign * step * direction)
                total = objective.loss_given_excursion(lm, batch, span, excursed()).total
                weight.sub_(sign * step * direction)
            found.append(float(total))
        return (found[0] - found[1]) / (2 * step)

    assert difference(lambda: start) == pytest.approx(exact, rel=1e-6)
    assert abs(difference(output) - exact) > 1e-3 * abs(exact)


def test_EAVI4_an_excursion_has_no_graph_and_restores_modes_and_random_state(lm):
    batch = batch_of()
    span = last_answer_span(batch.mask)
    lm.train()
    lm.blocks[1].eval()
    modes = [module.training for module in lm.modules()]
    before = torch.get_rng_state()
    output = excursion(lm, batch.ids, span, temperature=1.0, hard=False)
    assert not output.requires_grad
    assert output.grad_fn is None
    assert [module.training for module in lm.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in lm.parameters())


def most_bytes(call: Callable[[], object]) -> int:
    """Of all tensors that a call makes, at the same time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = call()
    assert found.profiler is not None
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    del kept
    return max(accumulate(event.nbytes() for event in events))


def test_EAVI4_memory_does_not_grow_with_the_excursion_except_caches_and_answers(lm):
    ids = torch.randint(VOCAB, (4, 20 + 64), generator=torch.Generator().manual_seed(0))

    def beside(length: int) -> int:
        span = AnswerSpan(torch.full((4,), 19), torch.full((4,), length))
        answers = 4 * length * VOCAB * 8
        caches = sum(cache.nbytes() for cache in lm.new_caches(4, 20 + length))
        whole = most_bytes(lambda: excursion(lm, ids, span, temperature=1.0, hard=False))
        return whole - answers - caches

    beside(2)  # allocations that happen only once
    assert abs(beside(64) - beside(4)) < 1000


def test_EAVI4_an_excursion_has_no_dropout_and_draws_no_random_numbers(small):
    dropout = {"dropout": {"residual": 0.3, "embedding": 0.3, "attention": 0.3}}
    lm = small(vocab_size=VOCAB, pattern=[MODELS["dense"]], **dropout).train()
    batch = batch_of()
    span = last_answer_span(batch.mask)
    settings = {"temperature": 1.0, "hard": False}
    output = excursion(lm, batch.ids, span, **settings)
    assert torch.equal(excursion(lm, batch.ids, span, **settings), output)
    drawn = []
    for run in (
        lambda: ready().loss(lm, batch),
        lambda: ready().loss_given_excursion(lm, batch, span, output),
    ):
        torch.manual_seed(1)
        run()
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_EAVI5_an_excursion_uses_only_the_length_of_the_answer(lm):
    batch = batch_of()
    span = last_answer_span(batch.mask)
    ids = batch.ids.clone()
    for row, start in enumerate(span.opener_B.tolist()):
        ids[row, start + 1 :] = (ids[row, start + 1 :] + 5) % VOCAB
    assert not torch.equal(ids, batch.ids)
    output = [excursion(lm, each, span, temperature=1.0, hard=False) for each in (batch.ids, ids)]
    assert torch.equal(*output)


class Copier:
    """A policy that is sure its last token comes again."""

    def __init__(self, sure: float = 20.0):
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self.head = nn.Linear(VOCAB, VOCAB, bias=False).double()
        self.head.weight.data = sure * torch.eye(VOCAB, dtype=torch.float64)
        self.embed = SimpleNamespace(weight=torch.zeros(1, dtype=torch.float64))

    def __call__(self, ids, positions=None, segments=None, caches=None, logits=True) -> ModelOut:
        hidden = ids.double() if ids.dim() == 3 else F.one_hot(ids, VOCAB).double()
        output = self.head(hidden[:, -1:] if logits == "last" else hidden)
        return ModelOut(output if logits else None, {}, {}, {}, hidden)

    def new_caches(self, rows: int, capacity: int) -> list:
        return []

    def modules(self) -> list:
        return []

    def eval(self) -> None:
        pass


@pytest.mark.parametrize("objective", ["sft", "eavi"])
def test_EAVI6_a_model_that_copies_its_last_token_is_worse_than_chance(objective):
    """With labels that are not shifted it would be perfect."""
    ids = torch.randint(0, VOCAB, (8, 40), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(39).expand(8, 39)
    mask = (positions > 10).clone()
    batch = Batch(
        *(ids[:, :-1], ids[:, 1:] * mask, mask, positions, torch.zeros_like(positions)),
        torch.zeros(8, dtype=torch.long),
    )
    made = SFT().build() if objective == "sft" else ready()
    policy = cast(LM, Copier())
    nats = float(made.loss(policy, batch).total.detach() / made.units(batch))
    assert nats > math.log(VOCAB)
    unshifted = batch._replace(targets=batch.ids * mask)
    total = SFT().build().loss(policy, unshifted).total.detach()
    assert float(total) == pytest.approx(0, abs=1e-4)


def test_EAVI7_the_teacher_forced_rows_are_an_ordinary_step(lm):
    batch = batch_of()
    teacher = SFT(reads="answers").build()
    alone = teacher.loss(lm.eval(), batch)
    none = ready(alignment_weight=0.0).loss(lm, batch)
    torch.testing.assert_close(none.total, alone.total, rtol=1e-12, atol=0)
    mine, theirs = gradients(lm, none.total), gradients(lm, alone.total)
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-9, atol=1e-11)
    answers = last_answer_span(batch.mask).target_mask(batch.mask)
    hidden = lm(batch.ids, batch.positions, batch.segments, logits=False).hidden
    expected = token_nll(hidden[answers], batch.targets[answers], lm.head).sum()
    reported = ready().loss(lm, batch).metrics["teacher_forcing_loss"]
    torch.testing.assert_close(reported.total, expected, rtol=1e-12, atol=0)


def test_outputs_of_demonstrations_count_once_for_any_alignment_weight(small):
    lm = small(vocab_size=VOCAB, pattern=[MODELS["dense"]])
    every, last = batch_of(every=True), batch_of(every=False)
    reported = []
    for share in (0.2, 0.7):
        totals = [ready(alignment_weight=share).loss(lm, each).total for each in (every, last)]
        reported.append(float((totals[0] - totals[1]).detach()))
    assert reported[0] == pytest.approx(reported[1], rel=1e-12)
    assert reported[0] > 1
    assert ready().units(every) == every.mask.sum() > ready().units(last)


def test_auxiliary_losses_are_added_once_over_both_kinds_of_rows(small):
    lm = small(vocab_size=VOCAB, pattern=[MODELS["minutes"]]).train()
    batch = batch_of()
    span = last_answer_span(batch.mask)
    output = excursion(lm, batch.ids, span, temperature=1.0, hard=False)
    found = ready().loss_given_excursion(lm, batch, span, output)
    true = F.one_hot(batch.ids, VOCAB).double()
    both = torch.cat((true, splice_excursion(true, span, output)))
    out = lm(both, batch.positions.repeat(2, 1), batch.segments.repeat(2, 1), logits=False)
    routers = sum(float(value) for value in out.losses.values())
    weight = float(batch.mask.sum())
    plain = found.metrics["loss"].total
    assert routers > 0
    assert float(found.total) == pytest.approx(float(plain) + routers * weight, rel=1e-12)
    tokens = [value for name, value in found.stats.items() if name.endswith("feed.tokens")]
    assert tokens[0] == 2 * (batch.segments >= 0).sum()


def test_answers_with_the_shape_of_their_inputs_are_reported_separately(small):
    lm = small(vocab_size=VOCAB, pattern=[MODELS["dense"]])
    batch = batch_of(("recolour", "count", "fill", "tile"))
    found = ready(alignment_weight=1.0).loss(lm, batch).metrics
    pair = [
        ready(alignment_weight=1.0).loss(lm, batch.rows(n, n + 1)).metrics["alignment_loss"]
        for n in (0, 2)
    ]
    equal = found["alignment_loss_equal_shape"]
    assert equal.count == sum(each.count for each in pair)
    assert float(equal.total) == pytest.approx(sum(float(each.total) for each in pair), rel=1e-10)
    assert equal.count < found["alignment_loss"].count
    none = ready().loss(lm, batch.rows(1, 2)).metrics["alignment_loss_equal_shape"]
    assert none.count == none.total == 0


def test_rows_do_not_depend_on_the_other_rows_of_the_batch(lm):
    """T4: sums over micro-batches are the sum over the batch."""
    lm.eval()
    batch = batch_of()
    whole = gradients(lm, ready().loss(lm, batch).total)
    parts = [gradients(lm, ready().loss(lm, part).total) for part in batch.split(1)]
    for name, gradient in whole.items():
        summed = torch.stack([part[name] for part in parts]).sum(0)
        torch.testing.assert_close(summed, gradient, rtol=1e-8, atol=1e-9)


def test_training_reduces_the_alignment_loss_and_answers_become_correct(small):
    """T11: on a few tasks, the alignment loss falls with that of teacher forcing, and hard
    excursions become correct.
    """
    layer = {"mixer": GQA, "feed_forward": SWIGLU}
    torch.manual_seed(0)
    lm = small(dtype=torch.float32, vocab_size=VOCAB, pattern=[layer]).train()
    batch = batch_of(("mirror", "recolour", "half"), every=False)
    objective, optimizer = ready(), torch.optim.AdamW(lm.parameters(), lr=3e-3)
    first = None
    for _ in range(120):
        found = objective.loss(lm, batch)
        first = first or {name: float(m.total / m.count) for name, m in found.metrics.items()}
        optimizer.zero_grad()
        (found.total / objective.units(batch)).backward()
        optimizer.step()
    last = {name: float(m.total / m.count) for name, m in found.metrics.items()}
    assert last["alignment_loss"] < 0.2 * first["alignment_loss"]
    assert last["teacher_forcing_loss"] < 0.2 * first["teacher_forcing_loss"]
    span = last_answer_span(batch.mask)
    output = excursion(lm, batch.ids, span, temperature=1.0, hard=True).argmax(-1)
    for row, (start, count) in enumerate(zip(*map(torch.Tensor.tolist, span), strict=True)):
        assert torch.equal(output[row, :count], batch.targets[row, start : start + count])


@pytest.mark.parametrize(
    ("settings", "output"),
    [
        ({"alignment_weight": 1.1}, "alignment_weight=1.1 must be from 0 to 1"),
        ({"alignment_weight": -0.1}, "alignment_weight=-0.1"),
        ({"temperature": 0}, "temperature=0 must be a number above 0"),
    ],
)
def test_an_invalid_setting_gives_one_line_with_its_name(settings, output):
    with pytest.raises(ValueError, match=output):
        replace(EAVI(), **settings)


def test_a_one_hot_row_equals_its_ids_in_half_precision_too(small):
    lm = small(dtype=torch.float32, vocab_size=VOCAB, pattern=[MODELS["dense"]]).eval()
    ids = batch_of().ids
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        read, mixed = lm(ids), lm(F.one_hot(ids, VOCAB).float())
    assert read.hidden.dtype == mixed.hidden.dtype
    assert torch.equal(read.hidden, mixed.hidden)


def test_a_step_in_half_precision_equals_teacher_forcing(small):
    lm = small(dtype=torch.float32, vocab_size=VOCAB, pattern=[MODELS["dense"]])
    batch = batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        alone = SFT(reads="answers").build().loss(lm, batch).total
        none = ready(alignment_weight=0.0).loss(lm, batch)
        found = ready().loss(lm, batch)
    assert float(none.total.detach()) == pytest.approx(float(alone.detach()), rel=1e-3)
    found.total.backward()
    for name, parameter in lm.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_vocabulary_that_is_too_large_is_refused_in_one_line():
    tokenizer = cast(Tokenizer, SimpleNamespace(vocab_size=MAX_VOCAB_SIZE + 1))
    with pytest.raises(UserError, match="kind=eavi: 16,385 ids are too many") as caught:
        EAVI().build().prepare(cast(LM, None), tokenizer)
    assert "\n" not in str(caught.value)

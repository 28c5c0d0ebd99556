"""The engine beside full forwards, one token at a time."""

import itertools
import math
import random

import pytest
import torch

from tinsmith.core.errors import UserError
from tinsmith.infer import requests as rows_module
from tinsmith.infer.engine import Engine
from tinsmith.infer.sample import SamplingParams
from tinsmith.nn.model import LM

GREEDY = SamplingParams(temperature=0)
VOCAB = 48


def tokens_of(events):
    return [event.token for event in events]


def answers(engine, requests, finished):
    """Ask for all (prompt, sampling, count) and run to the end: the tokens of each."""
    numbers = [engine.add(prompt, sampling, count) for prompt, sampling, count in requests]
    events = finished(engine)
    return [tokens_of(events[number]) for number in numbers]


@pytest.mark.parametrize("lengths", [[7], [1, 1], [6, 6, 6], [1, 4, 9, 30, 2]])
def test_greedy_completions_equal_those_of_full_forwards(lm, draw, greedily, finished, lengths):
    prompts = [draw(length, seed) for seed, length in enumerate(lengths)]
    found = answers(Engine(lm), [(prompt, GREEDY, 12) for prompt in prompts], finished)
    assert found == [greedily(lm, prompt, 12) for prompt in prompts]
    assert len({tuple(answer) for answer in found}) > 1 or len(lengths) == 1


def test_requests_are_added_and_finished_while_others_run(lm, draw, greedily):
    """More requests than rows, at random times; some are dropped, waiting or running."""
    turn = random.Random(3)
    engine = Engine(lm, max_batch_size=3)
    requested, received, dropped, most = {}, {}, set(), 0
    for step in itertools.count():
        if step < 40 and turn.random() < 0.4:
            prompt, count = draw(turn.randint(1, 20), step), turn.randint(1, 12)
            number = engine.add(prompt, GREEDY, count)
            requested[number], received[number] = (prompt, count), []
        if requested and turn.random() < 0.15:
            over = {n for n, events in received.items() if events and events[-1].finish_reason}
            number = turn.choice(sorted(requested)[-5:])
            engine.cancel(number)
            dropped |= {number} - over
        for event in engine.step():
            assert event.request_id not in dropped
            received[event.request_id].append(event)
        most = max(most, engine.num_active)
        assert engine.num_active <= 3
        if step >= 40 and not engine.num_active and not engine.num_waiting:
            break
    assert most == 3
    assert len(requested) > 10
    assert dropped
    for number, (prompt, count) in requested.items():
        expected = greedily(lm, prompt, count)
        found = tokens_of(received[number])
        assert found == (expected[: len(found)] if number in dropped else expected)
        assert [event.finish_reason for event in received[number][:-1]] == [None] * (len(found) - 1)


def test_freed_slots_are_refilled_in_small_batches(small, draw):
    """Of 32 rows two must be free, or as many as there are prompts left to wait for them."""
    engine = Engine(small(), max_batch_size=32)
    for seed in range(35):
        engine.add(draw(4, seed), GREEDY, 2 + seed)
    free = []
    while engine.num_waiting or engine.num_active:
        before = engine.num_waiting
        left = 32 - engine.num_active
        engine.step()
        if before and before < 35:
            free.append((left, before, before - engine.num_waiting))
    assert free[0] == (0, 3, 0)
    assert all(bool(taken) == (left >= min(2, before)) for left, before, taken in free)
    assert any(left == 1 and not taken for left, before, taken in free)
    assert free[-1][1:] == (1, 1)


def test_long_prompts_are_prefilled_in_chunks_while_others_decode(
    small, draw, greedily, monkeypatch
):
    monkeypatch.setattr(rows_module, "PREFILL_CHUNK_SIZE", 8)
    lm = small([{"heads": 4, "window": 5}, {"heads": 4}])
    engine = Engine(lm, max_batch_size=4)
    prompts = [draw(3), draw(30), draw(21), draw(40)]
    received = {engine.add(prompts[0], GREEDY, 20): []}
    engine.step()
    received |= {engine.add(prompt, GREEDY, 6): [] for prompt in prompts[1:]}
    speakers = []
    while engine.num_active or engine.num_waiting:
        events = engine.step()
        speakers.append([event.request_id for event in events])
        for event in events:
            received[event.request_id].append(event.token)
    assert speakers == [[0]] * 4 + [[0, 1, 2, 3]] * 6 + [[0]] * 9
    received[0].insert(0, greedily(lm, prompts[0], 1)[0])
    for number, count in enumerate([20, 6, 6, 6]):
        assert received[number] == greedily(lm, prompts[number], count)


def test_a_request_cancelled_during_prefill_generates_nothing(small, draw, greedily, monkeypatch):
    monkeypatch.setattr(rows_module, "PREFILL_CHUNK_SIZE", 8)
    lm = small()
    engine = Engine(lm)
    numbers = [engine.add(draw(20, seed), GREEDY, 4) for seed in range(2)]
    assert engine.step() == []
    assert (engine.num_active, engine.num_waiting) == (2, 0)
    engine.cancel(numbers[0])
    assert engine.num_active == 1
    assert tokens_of(engine.run()) == greedily(lm, draw(20, 1), 4)


def test_caches_grow_with_the_rows_and_shrink_afterwards(small, draw, greedily, finished):
    lm = small([{"heads": 4, "window": 300}, {"heads": 4}], max_seq_len=2000, depth=2)
    engine = Engine(lm)
    nothing = engine.nbytes()
    number = engine.add(draw(250), GREEDY, 20)
    assert engine.step()[0].request_id == number
    early = engine.nbytes()
    other = engine.add(draw(700), GREEDY, 3)
    assert len(engine.step() + engine.step()) == 3
    late = engine.nbytes()
    events = finished(engine)
    row = 2 * 32 * 8
    assert (nothing, early, late) == (0, row * 256 * 2, 2 * row * (300 + 1024))
    assert tokens_of(events[number]) == greedily(lm, draw(250), 20)[3:]
    assert tokens_of(events[other]) == greedily(lm, draw(700), 3)[1:]
    assert engine.nbytes() == 0


def test_a_row_outgrows_its_caches_while_it_decodes(small, draw, greedily, finished):
    """Past 256 tokens, below, at and beyond a window."""
    lm = small([{"heads": 4, "window": 258}, {"heads": 4}], max_seq_len=400, depth=2)
    requests = [(draw(250), GREEDY, 20), (draw(240), GREEDY, 12)]
    expected = [greedily(lm, prompt, count) for prompt, _, count in requests]
    assert answers(Engine(lm), requests, finished) == expected


def test_S4_the_same_seed_gives_the_same_tokens_in_any_batch(lm, draw, finished):
    chosen = SamplingParams(temperature=1.5, top_k=30, top_p=0.95, repetition_penalty=1.1, seed=11)
    requests = [(draw(9), chosen, 15)]
    alone = answers(Engine(lm), requests, finished)[0]
    others = [
        (draw(length, 5), SamplingParams(temperature=heat, seed=length), 9)
        for length, heat in ((3, 1.0), (9, 0.0), (20, 2.0), (1, 0.7))
    ]
    for before in range(5):
        for rows in (2, 8):
            mixed = others[:before] + requests + others[before:]
            assert answers(Engine(lm, max_batch_size=rows), mixed, finished)[before] == alone
    different = answers(
        Engine(lm), [(draw(9), SamplingParams(temperature=1.5, seed=12), 15)], finished
    )
    assert different[0] != alone


def test_S4_the_same_seed_gives_the_same_tokens_in_float32(small, draw, finished):
    lm = small(dtype=torch.float32)
    chosen = SamplingParams(temperature=1.0, seed=2)
    alone = answers(Engine(lm), [(draw(9), chosen, 40)], finished)[0]
    others = [(draw(length, 5), SamplingParams(seed=length), 40) for length in (3, 9, 20)]
    assert answers(Engine(lm), [*others, (draw(9), chosen, 40)], finished)[3] == alone


def test_without_a_seed_completions_differ(small, draw, finished):
    requests = [(draw(5), SamplingParams(temperature=2.0), 30)] * 2
    first, second = answers(Engine(small()), requests, finished)
    assert first != second


def test_logprobs_equal_those_of_full_forwards(lm, draw):
    engine = Engine(lm)
    prompt = draw(6)
    engine.add(prompt, SamplingParams(temperature=0.7, top_k=5, seed=1), 10)
    events = list(engine.run())
    ids = torch.tensor([prompt + tokens_of(events)])
    with torch.no_grad():
        logits = lm(ids).logits[0, len(prompt) - 1 : -1]
    reported = (logits / torch.tensor(0.7)).log_softmax(-1)
    expected = reported.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()
    assert [event.logprob for event in events] == pytest.approx(expected, abs=1e-9)


def test_repetition_penalty_covers_prompt_and_completion(small, draw, finished):
    """A penalty that leaves a token no chance twice: all that is said is new."""
    prompt = draw(10)
    chosen = SamplingParams(temperature=0, repetition_penalty=1e6)
    requests = [(prompt, chosen, 30), (draw(4), GREEDY, 30), (draw(3), chosen, 20)]
    first, plain, second = answers(Engine(small(), max_batch_size=2), requests, finished)
    assert len({*prompt, *first}) == len({*prompt}) + 30
    assert len({*draw(3), *second}) == len({*draw(3)}) + 20
    assert len(set(plain)) < 30


def calls(lm, monkeypatch):
    """The shapes of ids that the model is called with, as they come."""
    shapes, forward = [], LM.forward

    def counted(self, ids, *rest, **named):
        shapes.append(tuple(ids.shape))
        return forward(self, ids, *rest, **named)

    monkeypatch.setattr(LM, "forward", counted)
    return shapes


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_a_group_shares_its_prompt(lm, draw, finished, monkeypatch, rows):
    """Taken in once, even where its answers do not all find rows at once."""
    prompts = [draw(9), draw(8)]
    samplings = [SamplingParams(temperature=1.0, seed=seed) for seed in range(4)]
    alone = [
        answers(Engine(lm), [(prompt, chosen, 7)], finished)[0]
        for prompt in prompts
        for chosen in samplings
    ]
    shapes = calls(lm, monkeypatch)
    engine = Engine(lm, max_batch_size=rows)
    numbers = [n for prompt in prompts for n in engine.add_group(prompt, samplings, 7)]
    assert engine.num_waiting == 8
    events = finished(engine)
    assert [tokens_of(events[number]) for number in numbers] == alone
    taken_in = [shape for shape in shapes if shape[1] > 1]
    assert taken_in == ([(2, 9)] if rows == 8 else [(1, 9), (1, 8)])
    assert len({tuple(answer) for answer in alone}) == 8


def test_prompts_of_very_different_length_are_not_padded_to_one(small, draw, finished, monkeypatch):
    lm = small()
    shapes = calls(lm, monkeypatch)
    requests = [(draw(length, seed), GREEDY, 3) for seed, length in enumerate([4, 5, 60, 50, 3, 2])]
    answers(Engine(lm), requests, finished)
    assert [shape for shape in shapes if shape[1] > 1] == [(2, 5), (3, 60), (1, 2)]


def test_a_completion_ends_at_a_stop_token_or_its_length(small, draw, greedily, finished):
    lm = small()
    whole = greedily(lm, draw(6), 12)
    third = next(t for t in whole[2:] if t not in whole[:2])
    until = whole.index(third) + 1
    for engine, stop_ids in ((Engine(lm, eos_ids=[third]), ()), (Engine(lm), [third])):
        engine.add(draw(6), GREEDY, 12, stop_ids)
        events = list(engine.run())
        assert tokens_of(events) == whole[:until]
        assert [e.finish_reason for e in events] == [None] * (until - 1) + ["stop"]
    for count in (1, 2, 12):
        engine = Engine(lm)
        engine.add(draw(6), GREEDY, count)
        events = list(engine.run())
        assert tokens_of(events) == whole[:count]
        assert [e.finish_reason for e in events] == [None] * (count - 1) + ["length"]


@pytest.mark.parametrize("capacity", [10, 128, None, 4000])
def test_a_completion_ends_when_the_row_is_full(lm, draw, greedily, capacity):
    """The model's context is the limit, whatever the capacity."""
    engine = Engine(lm, max_seq_len=capacity)
    most = min(capacity or 128, 128)
    engine.add(draw(6), GREEDY, 1000)
    engine.add(draw(most - 1), GREEDY, 1000)
    events = list(engine.run())
    for number, prompt in enumerate((draw(6), draw(most - 1))):
        own = [event for event in events if event.request_id == number]
        assert tokens_of(own) == greedily(lm, prompt, most - len(prompt))
        assert own[-1].finish_reason == "length"


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "none"])
def test_other_position_encodings_up_to_the_last_position(
    small, draw, greedily, finished, positions
):
    lm = small(positions=positions, max_seq_len=20)
    requests = [(draw(4), GREEDY, 100), (draw(9), GREEDY, 100)]
    assert answers(Engine(lm), requests, finished) == [
        greedily(lm, draw(4), 16),
        greedily(lm, draw(9), 11),
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_nan_logits_of_one_request_end_that_request_and_no_other(
    small, draw, finished, temperature, broken, when
):
    """One token has a broken embedding. A prompt ends with it, or one request gets it as its first
    token and fails after that.
    """
    lm = small()
    params = [SamplingParams(temperature=temperature, seed=seed) for seed in range(4)]
    sound = [(draw(9, seed), each, 12) for seed, each in enumerate(params)]
    alone = [answers(Engine(lm), [request], finished)[0] for request in sound]
    used = {token for request in sound for token in request[0]}.union(*alone, draw(5, 1))
    bad_token = min(set(range(VOCAB)) - used)
    with torch.no_grad():
        lm.embed.weight[bad_token] = broken
    engine = Engine(lm, max_batch_size=3)
    ids = [engine.add(*request) for request in sound[:2]]
    failing = engine.add(
        [*draw(5, 1), bad_token] if when == "prefill" else draw(5, 1), params[0], 30
    )
    ids += [engine.add(*request) for request in sound[2:]]
    events = {}
    while engine.num_active or engine.num_waiting:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
            if event.request_id == failing and when == "decode" and event.token is not None:
                row = [request.request_id for request in engine._running].index(failing)
                engine._last_tokens_B = engine._last_tokens_B.clone()
                engine._last_tokens_B[row] = bad_token
    assert [tokens_of(events[request_id]) for request_id in ids] == alone
    *before, last = events[failing]
    assert last == (failing, None, None, "error")
    assert len(before) == (0 if when == "prefill" else 1)


def test_after_a_failed_request_the_engine_goes_on(small, draw, greedily):
    lm = small()
    weight = lm.norm.weight[3].item()
    engine = Engine(lm, max_batch_size=2)
    for seed in range(3):
        engine.add(draw(4, seed), GREEDY, 10)
    engine.step()
    with torch.no_grad():
        lm.norm.weight[3] = math.nan
    assert [event.finish_reason for event in engine.step()] == ["error", "error"]
    assert (engine.num_active, engine.num_waiting) == (0, 1)
    with torch.no_grad():
        lm.norm.weight[3] = weight
    assert tokens_of(engine.run()) == greedily(lm, draw(4, 2), 10)


@pytest.mark.parametrize(
    ("prompt", "max_new", "message"),
    [
        ([], 5, "no tokens"),
        ([1, VOCAB], 5, f"outside 0..{VOCAB - 1}"),
        ([-1], 5, "outside"),
        ([1] * 128, 5, "has 128 tokens, and prompt and completion together may have 128"),
        ([1], 0, "max_new_tokens=0"),
    ],
)
def test_invalid_requests_raise(small, prompt, max_new, message):
    engine = Engine(small())
    with pytest.raises(UserError, match=message):
        engine.add(prompt, GREEDY, max_new)
    assert engine.num_waiting == 0


@pytest.mark.parametrize("key", ["max_batch_size", "max_seq_len"])
def test_invalid_engine_sizes_raise(small, key):
    with pytest.raises(UserError, match=f"{key}=0"):
        Engine(small(), **{key: 0})


def test_a_model_in_training_mode_raises(small, draw):
    engine = Engine(small().train())
    engine.add(draw(3), GREEDY, 3)
    with pytest.raises(ValueError, match=r"lm\.eval"):
        engine.step()


def test_cancelling_a_finished_or_unknown_request_does_nothing(small, draw):
    engine = Engine(small())
    number = engine.add(draw(3), GREEDY, 2)
    assert len(list(engine.run())) == 2
    engine.cancel(number)
    engine.cancel(99)
    assert (engine.num_active, engine.num_waiting, engine.step()) == (0, 0, [])


def test_another_precision_decodes_with_a_copy_of_the_weights(small, draw, greedily):
    lm = small(dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    engine = Engine(lm, dtype=torch.float64)
    engine.add(draw(5), GREEDY, 20)
    found = tokens_of(engine.run())
    for name, tensor in lm.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name])
    assert Engine(lm, dtype=torch.bfloat16).lm is lm
    assert found == greedily(lm.double(), draw(5), 20)


def test_the_engine_does_not_change_the_model(small, draw):
    """Generating uses no global random state and leaves nothing behind on the model."""
    lm = small()
    before = torch.get_rng_state()
    engine = Engine(lm)
    engine.add(draw(5), SamplingParams(temperature=1.0, seed=3), 10)
    list(engine.run())
    assert torch.equal(torch.get_rng_state(), before)
    lm(torch.tensor([draw(5)])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in lm.parameters())

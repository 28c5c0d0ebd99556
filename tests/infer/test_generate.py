"""Completions as text: characters, stop strings, streams of several requests."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.core.errors import Failure, UserError
from tinsmith.infer.completions import CompletionBuilder, CompletionEngine
from tinsmith.infer.engine import Event
from tinsmith.infer.generate import eval_mode, generate, stream, with_distinct_seeds
from tinsmith.infer.sample import SamplingParams

GREEDY = SamplingParams(temperature=0)
WARM = SamplingParams(temperature=1.5, seed=5)


@pytest.fixture
def lm(small, tokenizer):
    return small(vocab_size=tokenizer.vocab_size)


def build(tokenizer, ids, stop=(), finish_reason="length"):
    """The increments of text for these ids up to a stop string, and the builder."""
    builder = CompletionBuilder(tokenizer, stop)
    pieces = []
    for index, token in enumerate(ids):
        is_last = index == len(ids) - 1
        event = Event(0, token, -1.0, finish_reason if is_last else None)
        pieces.append(builder.push(event).text)
        if builder.finish_reason:
            break
    return pieces, builder


@settings(derandomize=True, max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 319), min_size=1, max_size=20))
def test_increments_never_split_a_character_and_join_to_the_text(tokenizer, ids):
    pieces, builder = build(tokenizer, ids)
    assert "".join(pieces) == builder.completion().text == tokenizer.decode(ids)
    whole = tokenizer.encode("naïve 你好 😀")
    pieces, _ = build(tokenizer, whole)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_is_emitted_when_it_is_complete(tokenizer):
    ids = [tokenizer.encode(bytes([byte]))[0] for byte in "a😀b".encode()]
    assert build(tokenizer, ids)[0] == ["a", "", "", "", "😀", "b"]
    assert build(tokenizer, ids[:4])[0] == ["a", "", "", "\ufffd"]


def test_a_stop_string_is_found_across_tokens(tokenizer):
    ids = [tokenizer.encode(bytes([byte]))[0] for byte in b"one\nEND two"]
    pieces, builder = build(tokenizer, ids, stop=["\nEND"])
    assert pieces == ["o", "n", "e", "", "", "", ""]
    assert builder.completion() == (ids[:7], "one", "stop", [-1.0] * 7)
    pieces, builder = build(tokenizer, ids[:6], stop=["\nEND"])
    assert builder.completion()[1:3] == ("one\nEN", "length")


def test_a_stop_token_is_among_the_ids_and_not_in_the_text(tokenizer):
    ids = [*tokenizer.encode("x + 1"), tokenizer.end_of_turn]
    _, builder = build(tokenizer, ids, finish_reason="stop")
    assert builder.completion()[:3] == (ids, "x + 1", "stop")


def test_a_buffered_prefix_of_a_stop_string_is_emitted_at_the_end(tokenizer):
    ids = [*tokenizer.encode("a#"), tokenizer.end_of_text]
    _, builder = build(tokenizer, ids, stop=["##"], finish_reason="stop")
    assert builder.completion().text == "a#"


def test_a_stream_gives_the_text_of_generate(lm, tokenizer):
    prompts = [tokenizer.encode(text) for text in ("def", "naïve café", "x")]
    whole = generate(lm, tokenizer, prompts, sampling_params=WARM, max_new_tokens=30)
    for prompt, completion in zip(prompts, whole, strict=True):
        pieces = list(stream(lm, tokenizer, prompt, sampling_params=WARM, max_new_tokens=30))
        assert "".join(pieces) == completion.text
        assert "" not in pieces
        assert len(completion.token_ids) == len(completion.logprobs) <= 30
    assert len({completion.text for completion in whole}) == 3


def test_stop_strings_end_completions_and_free_their_rows(lm, tokenizer):
    prompt = tokenizer.encode("def f")
    plain = generate(lm, tokenizer, [prompt], sampling_params=WARM, max_new_tokens=40)[0]
    assert plain.finish_reason == "length"
    stop = plain.text[8:12]
    where = plain.text.index(stop)
    cut = generate(
        lm,
        tokenizer,
        [prompt] * 3,
        sampling_params=WARM,
        max_new_tokens=40,
        stop=[stop],
        batch_size=1,
    )
    for completion in cut:
        assert (completion.text, completion.finish_reason) == (plain.text[:where], "stop")
        assert len(completion.token_ids) < 40
        assert completion.token_ids == plain.token_ids[: len(completion.token_ids)]
    pieces = stream(lm, tokenizer, prompt, sampling_params=WARM, max_new_tokens=40, stop=[stop])
    assert "".join(pieces) == plain.text[:where]


def test_completions_end_at_end_of_text_and_end_of_turn(small, tokenizer):
    assert tokenizer.eos_ids == (0, 2)
    for last in (0, 2):
        lm = small(vocab_size=tokenizer.vocab_size, depth=1)
        with torch.no_grad():
            for block in lm.blocks:
                block.mixer.o_proj.weight.zero_()
                block.feed.down_proj.weight.zero_()
            lm.head.weight.zero_()
            lm.head.weight[last] = lm.embed.weight[5]
        completion = generate(lm, tokenizer, [[5]], sampling_params=GREEDY, max_new_tokens=9)[0]
        assert completion[:3] == ([last], "", "stop")


def test_S4_completions_do_not_depend_on_other_requests(lm, tokenizer):
    prompts = [tokenizer.encode("def f(x):" + " x" * count) for count in range(5)]
    together = generate(
        lm, tokenizer, prompts, sampling_params=WARM, max_new_tokens=12, batch_size=3
    )
    for prompt, completion in zip(prompts, together, strict=True):
        alone = generate(lm, tokenizer, [prompt], sampling_params=WARM, max_new_tokens=12)[0]
        assert alone[:3] == completion[:3]


def test_several_completions_of_a_prompt_differ_and_the_first_equals_a_single_one(lm, tokenizer):
    prompt = tokenizer.encode("def")
    one = generate(lm, tokenizer, [prompt], sampling_params=WARM, max_new_tokens=20)
    three = generate(
        lm, tokenizer, [prompt] * 3, sampling_params=with_distinct_seeds(WARM, 3), max_new_tokens=20
    )
    assert three[0].token_ids == one[0].token_ids
    assert len({tuple(completion.token_ids) for completion in three}) == 3
    assert with_distinct_seeds(WARM, 3) == with_distinct_seeds(WARM, 4)[:3]
    assert with_distinct_seeds(SamplingParams(), 2) == [SamplingParams()] * 2


def test_every_prompt_may_have_its_own_sampling_params(lm, tokenizer):
    prompts = [tokenizer.encode("def"), tokenizer.encode("x")]
    each = generate(lm, tokenizer, prompts, sampling_params=[GREEDY, WARM], max_new_tokens=10)
    for completion, prompt, chosen in zip(each, prompts, (GREEDY, WARM), strict=True):
        assert (
            completion.token_ids
            == generate(lm, tokenizer, [prompt], sampling_params=chosen, max_new_tokens=10)[0][0]
        )
    with pytest.raises(ValueError, match="zip"):
        generate(lm, tokenizer, prompts, sampling_params=[GREEDY], max_new_tokens=10)


def test_a_stop_callback_ends_all_completions_early(lm, tokenizer):
    polls = iter([False] * 4 + [True])
    done = generate(
        lm,
        tokenizer,
        [[9], [9, 9]],
        sampling_params=WARM,
        max_new_tokens=50,
        batch_size=1,
        should_stop=lambda: next(polls),
    )
    assert [len(completion.token_ids) for completion in done] == [4, 0]
    assert [completion.finish_reason for completion in done] == ["cancelled"] * 2


def test_closing_a_stream_cancels_its_request_and_no_other(lm, tokenizer):
    engine = CompletionEngine(lm, tokenizer)
    first, second = (engine.add([7 + index], WARM, 60) for index in range(2))
    increments = iter(first)
    next(increments)
    assert engine.engine.num_active == 2
    increments.close()
    assert engine.engine.num_active == 1
    assert first.finish_reason == "cancelled"
    assert len(list(second)) == 60
    assert second.finish_reason == "length"
    assert not engine.busy


def test_every_reader_gets_the_events_of_its_own_request(lm, tokenizer):
    prompts = [tokenizer.encode(text) for text in ("def", "naïve café", "x", "def f(x)")]
    params = with_distinct_seeds(WARM, 4)
    alone = generate(lm, tokenizer, prompts, sampling_params=params, max_new_tokens=20)
    engine = CompletionEngine(lm, tokenizer, max_batch_size=2)
    streams = [engine.add(ids, each, 20) for ids, each in zip(prompts, params, strict=True)]
    iterators = [iter(each) for each in streams]
    received = [[] for _ in streams]
    turn = random.Random(0)
    unfinished = list(range(4))
    while unfinished:
        reader = turn.choice(unfinished)
        increment = next(iterators[reader], None)
        if increment is None:
            unfinished.remove(reader)
        else:
            received[reader].append(increment)
    for stream_, increments, expected in zip(streams, received, alone, strict=True):
        assert stream_.completion()[:3] == expected[:3]
        assert "".join(each.text for each in increments) == expected.text
        assert [each.token for each in increments] == expected.token_ids
        assert [each.logprob for each in increments] == pytest.approx(expected.logprobs)
        reasons = [each.finish_reason for each in increments]
        assert reasons == [None] * (len(increments) - 1) + [expected.finish_reason]


def test_a_reader_can_poll_without_running_the_engine(lm, tokenizer):
    engine = CompletionEngine(lm, tokenizer)
    first, second = (engine.add([7 + index], WARM, 5) for index in range(2))
    assert first.read() == []
    engine.step()
    engine.step()
    assert (len(first.read()), first.read()) == (2, [])
    assert len(list(first)) == 3
    assert len(second.read()) == 5


def test_a_stop_string_ends_one_request_of_several(lm, tokenizer):
    prompt = tokenizer.encode("def f")
    plain = generate(lm, tokenizer, [prompt], sampling_params=WARM, max_new_tokens=40)[0]
    stop = plain.text[8:12]
    engine = CompletionEngine(lm, tokenizer)
    stopped, whole = engine.add(prompt, WARM, 40, [stop]), engine.add(prompt, WARM, 40)
    while stopped.finish_reason is None:
        engine.step()
    assert stopped.completion().text == plain.text[: plain.text.index(stop)]
    assert engine.engine.num_active == 1
    assert "".join(whole.text()) == plain.text


def test_nan_weights_are_an_error_of_generate_and_of_stream(lm, tokenizer):
    with torch.no_grad():
        lm.embed.weight[5] = float("nan")
    arguments = {"sampling_params": WARM, "max_new_tokens": 5}
    with pytest.raises(Failure, match="logits are NaN or infinite"):
        generate(lm, tokenizer, [[6], [5]], **arguments)
    with pytest.raises(Failure, match="logits are NaN or infinite"):
        list(stream(lm, tokenizer, [5], **arguments))
    engine = CompletionEngine(lm, tokenizer)
    broken, sound = engine.add([5], WARM, 5), engine.add([6], WARM, 5)
    assert [each.finish_reason for each in broken] == ["error"]
    assert broken.completion() == ([], "", "error", [])
    assert len(list(sound)) == 5


def test_the_training_mode_of_the_model_is_restored(lm, tokenizer):
    lm.train()
    generate(lm, tokenizer, [[5]], sampling_params=GREEDY, max_new_tokens=3)
    assert lm.training
    pieces = stream(lm, tokenizer, [5], sampling_params=WARM, max_new_tokens=50)
    next(pieces)
    assert not lm.training
    pieces.close()
    assert lm.training
    with pytest.raises(UserError, match="no tokens"):
        generate(lm, tokenizer, [[]], sampling_params=GREEDY, max_new_tokens=3)
    assert lm.training
    with eval_mode(lm.eval()):
        pass
    assert not lm.training

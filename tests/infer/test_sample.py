"""Logits to tokens, beside transformers' processors and plain loops."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.infer.sample import (
    SamplingParams,
    draw,
    filter_logits,
    sample,
    stack_sampling_params,
    uniform,
)

INF = math.inf


def logits_of(rows, size, seed=0, scale=3.0):
    made = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, size, generator=made, dtype=torch.float64)


def seen_of(rows, size):
    return torch.arange(size).expand(rows, size) % 3 == 0


def kept(scores):
    return [row.isfinite().nonzero()[:, 0].tolist() for row in scores]


def theirs(logits, chosen, seen):
    """Log-probabilities after transformers' processors, in the order its `generate` has them."""
    from transformers.generation import logits_process as hf

    processors = [hf.TemperatureLogitsWarper(chosen.temperature)]
    if chosen.repetition_penalty != 1:
        processors.insert(0, hf.RepetitionPenaltyLogitsProcessor(chosen.repetition_penalty))
    if chosen.top_k is not None:
        processors.append(hf.TopKLogitsWarper(chosen.top_k))
    if chosen.top_p is not None:
        processors.append(hf.TopPLogitsWarper(chosen.top_p))
    if chosen.min_p is not None:
        processors.append(hf.MinPLogitsWarper(chosen.min_p))
    ids = seen.nonzero()[:, 0][None]
    scores = logits[None]
    for processor in processors:
        scores = processor(ids, scores)
    return scores[0].log_softmax(-1)


CASES = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.3, "top_k": 7},
    {"temperature": 1.0, "top_k": 100_000},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 2.5, "top_p": 0.999},
    {"temperature": 1.0, "top_p": 0.01},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.5, "top_k": 20, "top_p": 0.8},
    {"temperature": 3.0, "top_k": 300, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.9, "repetition_penalty": 1.3},
    {"temperature": 0.9, "repetition_penalty": 0.7, "top_k": 5, "top_p": 0.9},
]


@pytest.mark.parametrize("size", [10, 700])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_equal_those_of_transformers(case, size):
    chosen = SamplingParams(**case)
    logits, seen = logits_of(4, size), seen_of(4, size)
    mine = filter_logits(logits, stack_sampling_params([chosen] * 4), seen).log_softmax(-1)
    for row in range(4):
        expected = theirs(logits[row], chosen, seen[row])
        torch.testing.assert_close(mine[row], expected, rtol=1e-6, atol=1e-6)


def test_E5_top_p_takes_its_mass_from_the_tokens_that_top_k_keeps():
    """Random sizes above and below the candidates that are sorted first (256)."""
    numbers = random.Random(0)
    for _ in range(60):
        size = numbers.choice([300, 1000, 6400])
        chosen = SamplingParams(
            temperature=numbers.choice([0.7, 1.0, 2.0, 8.0]),
            top_k=numbers.choice([5, 256, 257, 300, 999, size - 1, size]),
            top_p=numbers.choice([0.05, 0.2, 0.5, 0.9, 0.99]),
        )
        logits = logits_of(1, size)
        mine = filter_logits(logits, stack_sampling_params([chosen]), seen_of(1, size))
        expected = theirs(logits[0].double(), chosen, seen_of(1, size)[0])
        assert kept(mine) == [expected.isfinite().nonzero()[:, 0].tolist()], chosen


@pytest.mark.parametrize("size", [10, 700])
def test_filtering_a_row_does_not_depend_on_the_batch(size):
    samplings = [SamplingParams(**case) for case in CASES] + [SamplingParams(temperature=0)]
    logits, seen = logits_of(len(samplings), size), seen_of(len(samplings), size)
    together = filter_logits(logits, stack_sampling_params(samplings), seen)
    for row, chosen in enumerate(samplings):
        part = slice(row, row + 1)
        alone = filter_logits(logits[part], stack_sampling_params([chosen]), seen[part])
        torch.testing.assert_close(together[part], alone, rtol=0, atol=0)


def test_of_equal_scores_the_lower_ids_are_kept():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 1.0, -INF, 1.0]])
    for count, expected in ((1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (5, [1, 2, 3, 4, 5])):
        scores = filter_logits(
            logits, stack_sampling_params([SamplingParams(temperature=1, top_k=count)])
        )
        assert kept(scores) == [expected]
    flat = torch.zeros(1, 8)
    assert kept(
        filter_logits(flat, stack_sampling_params([SamplingParams(temperature=1, top_p=0.3)]))
    ) == [[0, 1, 2]]


def test_top_p_beyond_the_first_candidates_is_exact():
    """A flat distribution needs more tokens than `FEW`."""
    flat = torch.zeros(2, 1000)
    chosen = [
        SamplingParams(temperature=1, top_p=0.5),
        SamplingParams(temperature=1, top_k=400, top_p=0.9),
    ]
    assert [len(row) for row in kept(filter_logits(flat, stack_sampling_params(chosen)))] == [
        500,
        360,
    ]


def test_the_highest_score_is_always_kept():
    logits = logits_of(3, 50)
    for case in ({"top_p": 0.0}, {"min_p": 1.0}, {"top_k": 1}):
        scores = filter_logits(
            logits, stack_sampling_params([SamplingParams(temperature=1, **case)] * 3)
        )
        assert kept(scores) == [[best] for best in logits.argmax(-1).tolist()]


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-6, 1e-3])
def test_S4_temperature_0_and_small_temperatures_are_greedy(temperature):
    logits = logits_of(64, 100).float()
    settings_ = stack_sampling_params([SamplingParams(temperature=temperature)] * 64)
    ids, logprobs = sample(logits, settings_, torch.full((64,), 0.5, dtype=torch.float64))
    assert ids.tolist() == logits.argmax(-1).tolist()
    assert logprobs.isfinite().all()


def test_S4_greedy_rows_stay_greedy_beside_others():
    logits = logits_of(8, 100)
    samplings = [SamplingParams(temperature=0 if row % 2 else 5.0) for row in range(8)]
    ids, logprobs = sample(
        logits, stack_sampling_params(samplings), torch.full((8,), 0.999, dtype=torch.float64)
    )
    best = logits.argmax(-1)
    assert ids[1::2].tolist() == best[1::2].tolist()
    assert ids[::2].tolist() != best[::2].tolist()
    reported = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs[1::2], reported[1::2])


def test_greedy_decoding_takes_the_lowest_of_equal_ids():
    logits = torch.tensor([[0.0, 3.0, 3.0, 3.0]])
    assert sample(logits, stack_sampling_params([SamplingParams(temperature=0)]))[0].tolist() == [1]


def test_repetition_penalty_applies_to_greedy_rows():
    logits = torch.tensor([[3.0, 2.0, -1.0], [-3.0, -2.0, -2.5]])
    seen = torch.tensor([[True, False, False], [False, True, False]])
    chosen = stack_sampling_params([SamplingParams(temperature=0, repetition_penalty=2.0)] * 2)
    assert sample(logits, chosen, None, seen)[0].tolist() == [1, 2]


def test_token_frequencies_equal_their_probabilities():
    """Against the exact distribution, on an even grid of random numbers."""
    logits = logits_of(1, 6, scale=1.0)
    count = 5000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    chosen = stack_sampling_params([SamplingParams(temperature=0.8, top_k=5, seed=0)])
    scores = filter_logits(logits, chosen)
    ids = draw(scores.expand(count, -1), grid)[:, 0]
    found = torch.bincount(ids, minlength=6) / count
    torch.testing.assert_close(found.double(), scores[0].softmax(-1), rtol=0, atol=1.01 / count)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    numbers=st.lists(st.sampled_from([-INF, -200.0, -30.0, -1.0, 0.0]), min_size=1, max_size=40),
    point=st.floats(0, 1, exclude_max=True),
)
def test_a_token_without_probability_is_never_drawn(numbers, point):
    logits = torch.tensor([[*numbers, 0.0, -INF]])
    for number in (point, 0.0, 1 - 2**-53):
        ids = draw(logits, torch.tensor([number], dtype=torch.float64))
        assert logits.softmax(-1)[0, int(ids)] > 0


def test_logprobs_are_of_the_unfiltered_distribution_at_the_rows_temperature():
    logits = logits_of(3, 50)
    case = {"top_k": 3, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.5}
    samplings = [
        SamplingParams(temperature=0.25, **case),
        SamplingParams(temperature=2.0),
        SamplingParams(),
    ]
    seen = seen_of(3, 50)
    ids, logprobs = sample(
        logits, stack_sampling_params(samplings), torch.full((3,), 0.4).double(), seen
    )
    heat = torch.tensor([[0.25], [2.0], [0.8]], dtype=torch.float64)
    expected = (logits / heat).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("broken", [math.nan, INF])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_give_a_nan_logprob(broken, temperature):
    logits = logits_of(2, 300)
    logits[1, 17] = broken
    chosen = SamplingParams(temperature=temperature, top_p=0.9, top_k=280, min_p=0.1)
    ids, logprobs = sample(
        logits, stack_sampling_params([chosen] * 2), torch.full((2,), 0.4).double()
    )
    assert logprobs.isfinite().tolist() == [True, False]
    assert 0 <= int(ids[1]) < 300


def test_random_numbers_are_a_function_of_seed_and_step_and_uniform():
    numbers = torch.tensor([uniform(seed, step) for seed in range(40) for step in range(100)])
    assert uniform(7, 3) == uniform(7, 3)
    assert len(set(numbers.tolist())) == 4000
    assert 0 <= numbers.min() < 0.002
    assert 0.998 < numbers.max() < 1
    counts = torch.histc(numbers.float(), 10, 0, 1)
    assert (counts - 400).abs().max() < 80


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", INF),
        ("top_k", 0),
        ("top_k", -5),
        ("top_p", 1.01),
        ("top_p", -0.1),
        ("top_p", math.nan),
        ("min_p", 1.5),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.nan),
    ],
)
def test_invalid_sampling_params_raise_with_their_key(key, value):
    with pytest.raises(ValueError, match=f"^{key}="):
        SamplingParams(**{key: value})

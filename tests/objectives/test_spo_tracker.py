"""The tracker of SPO against plain loops, and what its paper says of it."""

import random

import pytest

from tests.oracles import policy as oracle
from tinsmith.objectives.spo import Tracker


def test_tracker_equals_plain_loops():
    numbers = random.Random(0)
    tracker = Tracker(rho_min=0.875)
    past = {1: [], 2: [1.0, 0.0, 1.0], 2**62: [0.0] * 8}
    expected = {prompt: oracle.Tracker(rewards, 0.875) for prompt, rewards in past.items()}
    for prompt, rewards in past.items():
        tracker.begin(prompt, rewards)
    for _ in range(200):
        prompt = numbers.choice(list(past))
        reward, distance = numbers.random(), numbers.choice([0.0, 0.001, 0.01, 0.1, 5.0])
        tracker.update(prompt, reward, distance)
        expected[prompt].update(reward, distance)
        assert tracker.value(prompt) == pytest.approx(expected[prompt].value(), abs=1e-14)


@pytest.mark.parametrize(("distance", "rho"), [(0.0, 0.96), (100.0, 0.875), (0.006, 2**-0.1)])
def test_alpha_plus_beta_converges_to_1_over_1_less_rho(distance, rho):
    tracker = Tracker(rho_min=0.875)
    for _ in range(2000):
        tracker.update(7, 0.3, distance)
    assert sum(tracker.state[7]) == pytest.approx(1 / (1 - rho), rel=1e-12)
    assert tracker.value(7) == pytest.approx(0.3, rel=1e-9)


def test_forgetting_is_held_between_its_bounds():
    tracker = Tracker(rho_min=0.875, rho_max=0.96)
    assert tracker.rho(0.0) == 0.96
    assert tracker.rho(1e9) == 0.875
    assert tracker.rho(0.06 * 0.1) == pytest.approx(2**-0.1)


def test_a_prompt_begins_with_the_weight_of_its_past():
    tracker = Tracker(rho_min=0.875)
    assert tracker.value(3) == 0.5
    tracker.begin(4, [1.0] * 7)
    assert sum(tracker.state[4]) == pytest.approx(1 / (1 - 0.875))
    assert tracker.value(4) == pytest.approx(7.5 / 8)
    tracker.begin(5, [])
    assert tracker.state[5] == (0.5, 0.5)


def test_rewards_are_held_between_0_and_1():
    """A reward outside would drive alpha or beta below 0."""
    tracker = Tracker()
    for reward in (1.25, -0.5, 4.0) * 50:
        tracker.update(1, reward, 0.1)
        assert min(tracker.state[1]) >= 0
        assert 0 <= tracker.value(1) <= 1


def test_saved_and_loaded_it_is_the_same():
    tracker = Tracker()
    for prompt in (5, 2**62, 9):
        tracker.update(prompt, 0.2, 0.003)
    again = Tracker()
    again.load(tracker.saved())
    assert again.state == tracker.state
    empty = Tracker()
    empty.load(Tracker().saved())
    assert empty.state == {}


@pytest.mark.parametrize(("key", "value"), [("rho_min", 1.0), ("rho_max", 1.5), ("half", 0.0)])
def test_impossible_bounds_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        Tracker(**{key: value})

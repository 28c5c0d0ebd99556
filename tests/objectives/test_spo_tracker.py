"""The reward tracker of SPO against plain loops and the properties in its paper."""

import random

import pytest

from tests.oracles import policy as oracle
from tinsmith.objectives.spo import ValueTracker


def test_tracker_equals_plain_loops():
    numbers = random.Random(0)
    tracker = ValueTracker(rho_min=0.875)
    past = {1: [], 2: [1.0, 0.0, 1.0], 2**62: [0.0] * 8}
    expected = {prompt: oracle.Tracker(rewards, 0.875) for prompt, rewards in past.items()}
    for prompt, rewards in past.items():
        tracker.init_prompt(prompt, rewards)
    for _ in range(200):
        prompt = numbers.choice(list(past))
        reward, distance = numbers.random(), numbers.choice([0.0, 0.001, 0.01, 0.1, 5.0])
        tracker.update(prompt, reward, distance)
        expected[prompt].update(reward, distance)
        assert tracker.value(prompt) == pytest.approx(expected[prompt].value(), abs=1e-14)


@pytest.mark.parametrize(("distance", "rho"), [(0.0, 0.96), (100.0, 0.875), (0.006, 2**-0.1)])
def test_alpha_plus_beta_converges_to_1_over_1_less_rho(distance, rho):
    tracker = ValueTracker(rho_min=0.875)
    for _ in range(2000):
        tracker.update(7, 0.3, distance)
    assert sum(tracker.state[7]) == pytest.approx(1 / (1 - rho), rel=1e-12)
    assert tracker.value(7) == pytest.approx(0.3, rel=1e-9)


def test_the_forgetting_factor_stays_within_its_bounds():
    tracker = ValueTracker(rho_min=0.875, rho_max=0.96)
    assert tracker.rho(0.0) == 0.96
    assert tracker.rho(1e9) == 0.875
    assert tracker.rho(0.06 * 0.1) == pytest.approx(2**-0.1)


def test_a_prompt_starts_with_the_weight_of_its_initial_samples():
    tracker = ValueTracker(rho_min=0.875)
    assert tracker.value(3) == 0.5
    tracker.init_prompt(4, [1.0] * 7)
    assert sum(tracker.state[4]) == pytest.approx(1 / (1 - 0.875))
    assert tracker.value(4) == pytest.approx(7.5 / 8)
    tracker.init_prompt(5, [])
    assert tracker.state[5] == (0.5, 0.5)


def test_rewards_are_clipped_to_0_and_1():
    """A reward outside would drive alpha or beta below 0."""
    tracker = ValueTracker()
    for reward in (1.25, -0.5, 4.0) * 50:
        tracker.update(1, reward, 0.1)
        assert min(tracker.state[1]) >= 0
        assert 0 <= tracker.value(1) <= 1


def test_the_tracker_survives_saving_and_loading():
    tracker = ValueTracker()
    for prompt in (5, 2**62, 9):
        tracker.update(prompt, 0.2, 0.003)
    again = ValueTracker()
    again.load_state_dict(tracker.state_dict())
    assert again.state == tracker.state
    empty = ValueTracker()
    empty.load_state_dict(ValueTracker().state_dict())
    assert empty.state == {}


@pytest.mark.parametrize(
    ("key", "value"), [("rho_min", 1.0), ("rho_max", 1.5), ("kl_half_life", 0.0)]
)
def test_invalid_bounds_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        ValueTracker(**{key: value})

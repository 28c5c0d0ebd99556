"""A leap of the loss is noticed; its noise and its fall are not."""

import random

from tinsmith.train.guard import LossSpikeDetector


def test_a_leap_is_noticed_once_and_reported_beside_what_was_usual():
    noise, spikes = random.Random(0), LossSpikeDetector()
    losses = [3.0 + noise.gauss(0, 0.05) for _ in range(60)]
    assert [spikes.update(loss) for loss in losses] == [None] * 60
    usual = spikes.update(4.5)
    assert usual is not None
    assert abs(usual - 3.0) < 0.05
    assert [spikes.update(loss) for loss in (3.0, 4.5, 4.5, 3.0, *[4.5] * 30)] == [None] * 34


def test_a_falling_or_noisy_loss_is_no_leap():
    noise, spikes = random.Random(1), LossSpikeDetector()
    assert not any(spikes.update(8.0 * 0.97**step) for step in range(100))
    assert not any(spikes.update(2.0 + noise.gauss(0, 0.5)) for _ in range(300))


def test_the_first_losses_are_never_leaps():
    spikes = LossSpikeDetector()
    assert [spikes.update(loss) for loss in (1.0, 9.0, 1.0, 20.0)] == [None] * 4


def test_a_resumed_run_remembers_what_was_usual():
    spikes, later = LossSpikeDetector(), LossSpikeDetector()
    for loss in [2.0, 2.1] * 10:
        spikes.update(loss)
    later.load_state(spikes.state())
    reported = later.update(5.0)
    assert reported is not None
    assert reported == spikes.update(5.0)

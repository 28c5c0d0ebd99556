"""The loss-spike detector reports spikes, and neither noise nor falling losses."""

import random

from tinsmith.train.guard import LossSpikeDetector


def test_a_spike_is_reported_once_with_the_usual_loss():
    noise, detector = random.Random(0), LossSpikeDetector()
    losses = [3.0 + noise.gauss(0, 0.05) for _ in range(60)]
    assert [detector.update(loss) for loss in losses] == [None] * 60
    usual = detector.update(4.5)
    assert usual is not None
    assert abs(usual - 3.0) < 0.05
    assert [detector.update(loss) for loss in (3.0, 4.5, 4.5, 3.0, *[4.5] * 30)] == [None] * 34


def test_a_falling_or_noisy_loss_is_no_spike():
    noise, detector = random.Random(1), LossSpikeDetector()
    assert not any(detector.update(8.0 * 0.97**step) for step in range(100))
    assert not any(detector.update(2.0 + noise.gauss(0, 0.5)) for _ in range(300))


def test_the_first_losses_are_never_spikes():
    detector = LossSpikeDetector()
    assert [detector.update(loss) for loss in (1.0, 9.0, 1.0, 20.0)] == [None] * 4


def test_a_resumed_detector_keeps_the_usual_loss():
    detector, resumed = LossSpikeDetector(), LossSpikeDetector()
    for loss in [2.0, 2.1] * 10:
        detector.update(loss)
    resumed.load_state(detector.state())
    usual = resumed.update(5.0)
    assert usual is not None
    assert usual == detector.update(5.0)

"""Learning-rate schedules: shapes, end points, and MiniMind's schedule as a special case."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.optim.config import WSD, Constant, Cosine
from tinsmith.optim.schedule import lr_multiplier, warmup_warning

shares = st.floats(0, 1)
warmups = st.integers(0, 60)
schedules = st.one_of(
    st.builds(WSD, warmup=warmups, decay=shares, min_lr_ratio=shares),
    st.builds(Cosine, warmup=warmups, min_lr_ratio=shares),
    st.builds(Constant, warmup=warmups),
)


@given(schedule=schedules, steps=st.integers(1, 200), step=st.integers(0, 250))
@settings(derandomize=True, max_examples=300, deadline=None)
def test_multipliers_increase_in_warm_up_and_never_later(schedule, steps, step):
    here, after = lr_multiplier(schedule, step, steps), lr_multiplier(schedule, step + 1, steps)
    assert 0 <= here <= 1
    if step < steps:
        assert here > 0
    if step + 1 >= schedule.warmup:
        assert after <= here + 1e-12
    if step < schedule.warmup:
        assert here <= (step + 1) / schedule.warmup


@pytest.mark.parametrize("schedule", [WSD(warmup=10), Cosine(warmup=10), Constant(warmup=10)])
def test_warm_up_is_linear_from_one_over_warmup(schedule):
    climb = [lr_multiplier(schedule, step, 1000) for step in range(10)]
    assert climb == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert lr_multiplier(schedule, 10, 1000) == pytest.approx(1, abs=1e-4)


def test_cosine_without_warm_up_equals_minimind():
    for step in range(0, 1001, 7):
        expected = 0.1 + 0.45 * (1 + math.cos(math.pi * step / 1000))
        assert lr_multiplier(Cosine(min_lr_ratio=0.1, warmup=0), step, 1000) == pytest.approx(
            expected
        )


def test_cosine_is_halfway_in_the_middle_and_final_at_the_end():
    schedule = Cosine(warmup=20, min_lr_ratio=0.2)
    assert lr_multiplier(schedule, 60, 100) == pytest.approx(0.6)
    assert lr_multiplier(schedule, 100, 100) == pytest.approx(0.2)


def test_wsd_is_constant_then_linear_over_the_last_fraction():
    schedule = WSD(warmup=10, decay=0.4, min_lr_ratio=0.1)
    assert [lr_multiplier(schedule, step, 100) for step in (10, 35, 60)] == [1, 1, 1]
    assert lr_multiplier(schedule, 80, 100) == pytest.approx(0.55)
    assert lr_multiplier(schedule, 100, 100) == pytest.approx(0.1)
    assert lr_multiplier(WSD(warmup=0, decay=0.0), 99, 100) == 1


def test_constant_is_one_after_warm_up():
    assert {lr_multiplier(Constant(warmup=3), step, 50) for step in range(3, 50)} == {1.0}


@settings(derandomize=True, max_examples=200, deadline=None)
@given(schedule=schedules, steps=st.integers(1, 100))
def test_N3_a_rate_that_never_reaches_its_full_value_is_a_warning(schedule, steps):
    peak = max(lr_multiplier(schedule, step, steps) for step in range(steps))
    warning = warmup_warning(schedule, steps)
    if schedule.warmup > 1 and peak <= 0.99:
        assert warning is not None
        assert f"{schedule.warmup} steps in a run of {steps}" in warning
        assert f"reaches {peak:.0%}" in warning
    else:
        assert warning is None


def test_N3_the_default_schedule_warns_in_a_short_run():
    assert warmup_warning(WSD(), 1000) is None
    warning = warmup_warning(WSD(), 30)
    assert warning is not None
    assert warning.startswith("optim.schedule.warmup: 100 steps in a run of 30: ")

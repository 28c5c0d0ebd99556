"""Learning-rate schedules: functions of the step alone, the same for every parameter group."""

import math

from tinsmith.optim.config import WSD, Constant, Cosine


def lr_multiplier(schedule: WSD | Cosine | Constant, step: int, steps: int) -> float:
    """Return the factor of every base learning rate in step `step` (from 0) of `steps`.

    Warm-up increases from 1/warmup in step 0 to 1 in step warmup - 1. The decay reaches
    `min_lr_ratio` at `step == steps`, just after the last step, so no step has a rate of 0. If
    warm-up and decay overlap, the lower of the two applies.
    """
    step = min(step, steps)
    warmup = (step + 1) / schedule.warmup if step < schedule.warmup else 1.0
    match schedule:
        case WSD():
            decay = _stable_then_linear(schedule, step, steps)
        case Cosine():
            decay = _half_cosine(schedule, step, steps)
        case Constant():
            decay = 1.0
    return min(warmup, decay)


def warmup_warning(schedule: WSD | Cosine | Constant, steps: int) -> str | None:
    """Return a warning if the learning rate never reaches its full value in a run of `steps`."""
    if schedule.warmup <= 1:
        return None
    peak = max(lr_multiplier(schedule, step, steps) for step in range(steps))
    if peak > 0.99:
        return None
    return (
        f"optim.schedule.warmup: {schedule.warmup} steps in a run of {steps}: the learning rate "
        f"reaches {peak:.0%} of its full value; set a shorter warmup"
    )


def _stable_then_linear(schedule: WSD, step: int, steps: int) -> float:
    remaining, decay_steps = steps - step, schedule.decay * steps
    return (
        1.0
        if remaining >= decay_steps
        else schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * remaining / decay_steps
    )


def _half_cosine(schedule: Cosine, step: int, steps: int) -> float:
    progress = max(0, step - schedule.warmup) / max(1, steps - schedule.warmup)
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )

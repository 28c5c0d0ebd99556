"""Learning-rate schedules: pure functions of the step, the same for every parameter group."""

import math

from tinsmith.optim.config import WSD, Constant, Cosine


def lr_multiplier(schedule: WSD | Cosine | Constant, step: int, steps: int) -> float:
    """What every base learning rate is multiplied with in step `step` (counted from 0) of `steps`.

    Warm-up climbs from 1/warmup in step 0 to 1 in step warmup - 1. `final` is where the curve
    arrives at `step == steps`, just after the last step, so that no step is spent at a rate of 0.
    A run shorter than its warm-up, or whose warm-up meets its decay, follows the lower of the two.
    """
    step = min(step, steps)
    warm = (step + 1) / schedule.warmup if step < schedule.warmup else 1.0
    match schedule:
        case WSD():
            shape = _stable_then_linear(schedule, step, steps)
        case Cosine():
            shape = _half_cosine(schedule, step, steps)
        case Constant():
            shape = 1.0
    return min(warm, shape)


def _stable_then_linear(schedule: WSD, step: int, steps: int) -> float:
    left, span = steps - step, schedule.decay * steps
    return (
        1.0 if left >= span else schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * left / span
    )


def _half_cosine(schedule: Cosine, step: int, steps: int) -> float:
    done = max(0, step - schedule.warmup) / max(1, steps - schedule.warmup)
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * 0.5 * (
        1 + math.cos(math.pi * done)
    )

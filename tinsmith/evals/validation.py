"""What an objective says of data that are held back: its own metrics, as means."""

from collections.abc import Callable

import torch

from tinsmith.data.loader.loader import TokenizedDataset
from tinsmith.infer.generate import eval_mode
from tinsmith.nn.model import LM
from tinsmith.objectives.base import Objective


def evaluate_objective(
    objective: Objective,
    lm: LM,
    source: TokenizedDataset,
    *,
    max_samples: int,
    batch_size: int,
    device: torch.device | str,
    poll: Callable[[], object],
) -> dict[str, float]:
    """Every metric of `objective.loss` as a mean, over at most `rows` samples spread evenly over
    `source`, `batch_rows` at a time.

    `poll` is called before every batch and may raise to end it. No global random state is touched,
    and modes and gradients are as before. Nothing is differentiated, but gradients stay enabled, so
    that a policy and its reference are computed as they are in training.
    """
    sums: dict[str, tuple[float, float]] = {}
    with eval_mode(lm):
        for batch in source.iter_batches(batch_size, max_samples=max_samples):
            poll()
            for name, metric in objective.loss(lm, batch.to(device)).metrics.items():
                total, count = sums.get(name, (0.0, 0.0))
                sums[name] = total + float(metric.total), count + float(metric.count)
    return {name: total / count for name, (total, count) in sums.items() if count}

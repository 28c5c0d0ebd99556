"""Metric means over micro-batches and ranks, and training throughput."""

import time

import torch
from torch import Tensor

from tinsmith.objectives.base import Metric
from tinsmith.train.parallel import Ranks


class ThroughputMeter:
    """Training speed without the time of evaluation, samples and checkpoints."""

    def __init__(self, tokens: int):
        self._since = time.monotonic()
        self._paused = 0.0
        self._tokens = tokens

    def exclude(self, seconds: float) -> None:
        """Leave out seconds that were not spent on steps."""
        self._paused += seconds

    def tokens_per_second(self, now: float, tokens: int) -> float:
        """Return the tokens per second since the last call."""
        seconds = max(now - self._since - self._paused, 1e-9)
        speed = (tokens - self._tokens) / seconds
        self._since, self._paused, self._tokens = now, 0.0, tokens
        return max(speed, 1e-9)


class MetricAccumulator:
    """Totals and counts by metric name, in float64."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Metric]) -> None:
        """Add the totals and counts of one micro-batch."""
        for name, metric in metrics.items():
            pair = torch.stack([to_float64(metric.total), to_float64(metric.count)])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def merge(self, other: "MetricAccumulator") -> None:
        """Add the totals and counts of another accumulator."""
        for name, pair in other.sums.items():
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def all_reduce(self, ranks: Ranks) -> "MetricAccumulator":
        """Sum over all ranks, in place, with one all-reduce."""
        if self.sums and ranks.world_size > 1:
            names = sorted(self.sums)
            summed = ranks.all_reduce_sum(torch.stack([self.sums[name] for name in names]))
            self.sums = dict(zip(names, summed, strict=True))
        return self

    def means(self) -> dict[str, float]:
        """Return total / count by name, without metrics whose count is 0."""
        pairs = {name: pair.tolist() for name, pair in self.sums.items()}
        return {name: total / count for name, (total, count) in pairs.items() if count}

    def all_finite(self) -> bool:
        """Return True if no total is NaN or infinite."""
        return all(bool(torch.isfinite(pair).all()) for pair in self.sums.values())

    def state(self) -> dict[str, list[float]]:
        """Return the state for a checkpoint."""
        return {name: pair.tolist() for name, pair in sorted(self.sums.items())}

    def load_state(self, saved: dict[str, list[float]], device: torch.device) -> None:
        """Restore what `state` returned."""
        self.sums = {
            name: torch.tensor(pair, dtype=torch.float64, device=device)
            for name, pair in saved.items()
        }


def to_float64(value: Tensor) -> Tensor:
    """Convert to float64, on the CPU if the device is MPS, which has no float64."""
    value = value.detach()
    return (value.cpu() if value.device.type == "mps" else value).double()

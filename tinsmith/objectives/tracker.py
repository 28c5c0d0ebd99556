"""What a prompt's next answer is expected to earn: the value tracker of Single-stream Policy
Optimization (2509.13232, section 3).

    value = alpha / (alpha + beta)                                  before the answer
    rho   = 2^(-D / half), between rho_min and rho_max
    alpha <- rho alpha + r,   beta <- rho beta + 1 - r              after it

D says how far the policy has moved since it last answered this prompt; a constant rho remembers
1 / (1 - rho) answers.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Tracker:
    """One Beta distribution per prompt, in float64; a prompt that was never met has (1/2, 1/2)."""

    def __init__(self, *, rho_min: float = 0.875, rho_max: float = 0.96, half: float = 0.06):
        for name, value in (("rho_min", rho_min), ("rho_max", rho_max)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value} must be at least 0 and below 1")
        if rho_min > rho_max:
            raise ValueError(f"rho_min={rho_min} must not be above rho_max={rho_max}")
        if not half > 0:
            raise ValueError(f"half={half} must be above 0")
        self.rho_min, self.rho_max, self.half = rho_min, rho_max, half
        self.state: dict[int, tuple[float, float]] = {}
        """(alpha, beta) by prompt id."""

    def begin(self, prompt: int, rewards: Sequence[float]) -> None:
        """Start a prompt from N earlier rewards in [0, 1]: alpha + beta = 1 / (1 - rho_min), shared
        as (sum + 1/2) to (N - sum + 1/2).
        """
        count, right = len(rewards), sum(map(_held, rewards))
        weight = 1 / (1 - self.rho_min) / (count + 1) if count else 1.0
        self.state[prompt] = (weight * (right + 0.5), weight * (count - right + 0.5))

    def value(self, prompt: int) -> float:
        """The reward in [0, 1] that is expected of the next answer."""
        alpha, beta = self.state.get(prompt, (0.5, 0.5))
        return alpha / (alpha + beta)

    def rho(self, distance: float) -> float:
        """How much of the past is kept after the policy has moved by `distance`, in nats per
        token.
        """
        return min(max(2 ** (-distance / self.half), self.rho_min), self.rho_max)

    def update(self, prompt: int, reward: float, distance: float) -> None:
        """Take in the reward of an answer, held to [0, 1]."""
        alpha, beta = self.state.get(prompt, (0.5, 0.5))
        rho, reward = self.rho(distance), _held(reward)
        self.state[prompt] = (rho * alpha + reward, rho * beta + 1 - reward)

    def copy(self) -> "Tracker":
        """Another that may learn more."""
        other = Tracker(rho_min=self.rho_min, rho_max=self.rho_max, half=self.half)
        other.state = dict(self.state)
        return other

    def saved(self) -> dict[str, Tensor]:
        """For a checkpoint: `numbers` (N,) int64 and `shares` (N, 2) float64, alpha and beta."""
        numbers = torch.tensor(list(self.state), dtype=torch.int64)
        shares = torch.tensor(list(self.state.values()), dtype=torch.float64).reshape(-1, 2)
        return {"numbers": numbers, "shares": shares}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """The inverse of `saved`."""
        shares = (tuple(pair) for pair in saved["shares"].tolist())
        self.state = dict(zip(saved["numbers"].tolist(), shares, strict=True))


def _held(reward: float) -> float:
    return min(max(reward, 0.0), 1.0)

"""Policy optimisation in numpy and plain loops: GAE (1506.02438, equations 11 to 16), clipped PPO
(1707.06347, equation 7, and the clipped value loss of its implementation), and the tracker of SPO
(2509.13232, section 3). One row, one token, one prompt at a time.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def gae(rewards: Array, values: Array, mask: Array, gamma: float, lam: float):
    """advantages and returns (B, T): the sum over later masked tokens of (gamma lam)^l delta."""
    advantages, returns = np.zeros_like(values), np.zeros_like(values)
    for row in range(len(values)):
        places = np.flatnonzero(mask[row])
        v = [*values[row][places], 0.0]
        deltas = [rewards[row][p] + gamma * v[i + 1] - v[i] for i, p in enumerate(places)]
        for i, place in enumerate(places):
            weights = (gamma * lam) ** np.arange(len(places) - i)
            advantages[row, place] = np.dot(weights, deltas[i:])
            returns[row, place] = advantages[row, place] + v[i]
    return advantages, returns


def policy_loss(logprobs, old, advantages, mask, clip):
    total, count = 0.0, 0
    for index in zip(*np.nonzero(mask), strict=True):
        ratio = np.exp(logprobs[index] - old[index])
        held = min(max(ratio, 1 - clip), 1 + clip)
        total -= min(ratio * advantages[index], held * advantages[index])
        count += 1
    return total / count


def value_loss(values, old, returns, mask, clip):
    total, count = 0.0, 0
    for index in zip(*np.nonzero(mask), strict=True):
        near = min(max(values[index], old[index] - clip), old[index] + clip)
        total += 0.5 * max((values[index] - returns[index]) ** 2, (near - returns[index]) ** 2)
        count += 1
    return total / count


class Tracker:
    """One prompt's Beta: what SPO expects of the next answer to it."""

    def __init__(self, past: list[float], rho_min: float):
        size = 1 / (1 - rho_min)
        n = len(past)
        self.alpha = size * (sum(past) + 0.5) / (n + 1) if n else 0.5
        self.beta = size * (n - sum(past) + 0.5) / (n + 1) if n else 0.5
        self.rho_min = rho_min

    def value(self) -> float:
        return self.alpha / (self.alpha + self.beta)

    def update(self, reward: float, distance: float, half: float = 0.06) -> None:
        rho = min(max(2 ** (-distance / half), self.rho_min), 0.96)
        self.alpha = rho * self.alpha + reward
        self.beta = rho * self.beta + 1 - reward

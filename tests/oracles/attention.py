"""Attention written out one number at a time, from the definition; slow, and obvious.

    a_ts = exp(q_t . k_s / sqrt(d)) / (sum over seen s of exp(q_t . k_s / sqrt(d)) + exp(z))

s is seen by t where s <= t, s is of the same run of one segment id, and s > t - window.
"""

import math

from torch import Tensor, zeros


def seen_by(t: int, segments: list[int], window: int | None) -> list[int]:
    """The places that token t sees, walking back from it until its document or window ends."""
    seen = []
    for s in range(t, -1, -1):
        if segments[s] != segments[t] or (window is not None and t - s >= window):
            break
        seen.append(s)
    return seen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q (B, T, H, D), k and v (B, S, G, D); the T queries are the last T of the S tokens, whose
    document ids are `segments` (B, S). -> (B, T, H, D)
    """
    rows, queries, heads, width = q.shape
    keys, groups = k.shape[1:3]
    y = zeros(rows, queries, heads, v.shape[-1], dtype=q.dtype)
    for b in range(rows):
        for t in range(queries):
            places = seen_by(keys - queries + t, segments[b].tolist(), window)
            for h in range(heads):
                g = h * groups // heads
                powers = [
                    math.exp(float(q[b, t, h] @ k[b, s, g]) / math.sqrt(width)) for s in places
                ]
                total = sum(powers) + (math.exp(float(sinks[h])) if sinks is not None else 0.0)
                for s, power in zip(places, powers, strict=True):
                    y[b, t, h] += power / total * v[b, s, g]
    return y

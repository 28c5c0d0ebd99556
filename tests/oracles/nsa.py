"""Native Sparse Attention (2502.11089) written out one number at a time; slow, and obvious.

Everything here is about one document: its tokens are counted from 0.

    block i is the tokens i d .. i d + l - 1; seen by t once its last token is <= t
    p_t     = softmax over seen i of q_t . k~_i / sqrt(D)                        per head
    p'_t[j] = sum over m < l'/d, n < l/d, heads of the group of p_t[l'/d j + m - n]
    I_t     = own block t // l', block 0, block t // l' - 1, then the largest p'_t, ties by index
"""

import math
from typing import Any

import torch
from torch import Tensor


def softmax_sum(scores: list[float], values: list[Tensor], width: int) -> Tensor:
    """Values weighted by the softmax of their scores; zeros where there is none."""
    y = torch.zeros(width, dtype=torch.float64)
    peak = max(scores, default=0.0)
    total = sum(math.exp(score - peak) for score in scores)
    for score, value in zip(scores, values, strict=True):
        y += math.exp(score - peak) / total * value
    return y


def seen_blocks(t: int, size: int, stride: int) -> list[int]:
    """The compressed blocks whose last token is at or before t."""
    return [i for i in range(t + 1) if i * stride + size - 1 <= t]


def chosen_blocks(
    t: int,
    q_JD: Tensor,
    keys: list[Tensor],
    size: int,
    stride: int,
    select: int,
    count: int,
) -> list[int]:
    """Blocks of `select` tokens that the query heads q of one group choose at t, in ascending
    order.
    """
    seen = seen_blocks(t, size, stride)
    weight = dict.fromkeys(seen, 0.0)
    for q_D in q_JD:
        scores = [float(q_D @ keys[i]) / math.sqrt(len(q_D)) for i in seen]
        peak = max(scores, default=0.0)
        total = sum(math.exp(score - peak) for score in scores)
        for i, score in zip(seen, scores, strict=True):
            weight[i] += math.exp(score - peak) / total
    own = t // select
    importance = [0.0] * (own + 1)
    for j in range(own + 1):
        for m in range(select // stride):
            for n in range(size // stride):
                importance[j] += weight.get(select // stride * j + m - n, 0.0)
    forced = [j for j in dict.fromkeys((own, 0, own - 1)) if j >= 0]
    others = [j for j in range(own + 1) if j not in forced]
    others.sort(key=lambda j: (-round(importance[j] * 2**20), j))
    return sorted((forced + others)[:count])


def pooled(part: Any, tokens: list[Tensor]) -> Tensor:
    """phi of one block of one head: two linear layers over the tokens one after the other."""
    line = torch.cat([x + place for x, place in zip(tokens, part.positions, strict=True)])
    hidden = part.inner.weight @ line + part.inner.bias
    gelu = [x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in hidden.tolist()]
    return part.outer.weight @ torch.tensor(gelu, dtype=line.dtype)


def turned(x_D: Tensor, position: int, theta: float = 10000.0) -> Tensor:
    """Half-split rotation of one vector."""
    half = len(x_D) // 2
    y = x_D.clone()
    for i in range(half):
        angle = position / theta ** (2 * i / len(x_D))
        y[i] = x_D[i] * math.cos(angle) - x_D[i + half] * math.sin(angle)
        y[i + half] = x_D[i + half] * math.cos(angle) + x_D[i] * math.sin(angle)
    return y


@torch.no_grad()
def nsa(mixer: Any, x_TC: Tensor, first_TGD: Tensor | None = None) -> tuple[Tensor, list[Any]]:
    """What an NSA mixer (its weights, no norms) says to one document x (T, C), with the first
    layer's values where they are mixed in; and the blocks chosen, by group and token.
    """
    config, width = mixer.config, mixer.head_dim
    groups, share = config.num_kv_heads, config.heads // config.num_kv_heads
    size, stride = config.compress_block, config.compress_stride
    length = len(x_TC)

    def heads(linear: Any, t: int) -> Tensor:
        return (linear.weight @ x_TC[t]).view(-1, width)

    plain = [heads(mixer.q_proj, t) for t in range(length)]
    rotated = [torch.stack([turned(q, t) for q in plain[t]]) for t in range(length)]
    key = {
        name: [[turned(k, t) for k in heads(linear, t)] for t in range(length)]
        for name, linear in (("select", mixer.select_k), ("window", mixer.window_k))
    }
    value = [list(heads(mixer.window_v, t)) for t in range(length)]
    if first_TGD is not None:
        mix = mixer.value_mix
        value = [
            [mix[0] * first_TGD[t, g] + mix[1] * value[t][g] for g in range(groups)]
            for t in range(length)
        ]
    output, chosen = [], []
    blocks = seen_blocks(length - 1, size, stride)
    for t in range(length):
        gates = 1 / (1 + (-(mixer.branch_gate.weight @ x_TC[t] + mixer.branch_gate.bias)).exp())
        outputs = []
        for g in range(groups):
            raw_k = [heads(mixer.compress_k, s)[g] for s in range(length)]
            raw_v = [heads(mixer.compress_v, s)[g] for s in range(length)]
            keys = [pooled(mixer.pool_k, raw_k[i * stride : i * stride + size]) for i in blocks]
            values = [pooled(mixer.pool_v, raw_v[i * stride : i * stride + size]) for i in blocks]
            own = slice(g * share, (g + 1) * share)
            picked = chosen_blocks(
                t, plain[t][own], keys, size, stride, config.select_block, config.select_count
            )
            chosen.append((g, t, picked))
            for h in range(own.start, own.stop):

                def scores(q: Tensor, keys: list[Tensor]) -> list[float]:
                    return [float(q @ k) / math.sqrt(width) for k in keys]

                seen = seen_blocks(t, size, stride)
                compress = softmax_sum(
                    scores(plain[t][h], [keys[i] for i in seen]), [values[i] for i in seen], width
                )
                near = [s for s in range(t + 1) if s // config.select_block in picked]
                select = softmax_sum(
                    scores(rotated[t][h], [key["select"][s][g] for s in near]),
                    [heads(mixer.select_v, s)[g] for s in near],
                    width,
                )
                late = [s for s in range(t + 1) if s > t - config.window]
                window = softmax_sum(
                    scores(rotated[t][h], [key["window"][s][g] for s in late]),
                    [value[s][g] for s in late],
                    width,
                )
                a, b, c = gates.view(-1, 3)[h]
                outputs.append(a * compress + b * select + c * window)
        output.append(mixer.o_proj.weight @ torch.cat(outputs))
    return torch.stack(output), chosen

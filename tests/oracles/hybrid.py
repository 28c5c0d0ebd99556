"""Tiny-R2's hybrid attention from its description, one token, block and head at a time; slow, and
obvious. One document a row, no padding.
"""

import math

import torch
from torch import Tensor


def turned(x: Tensor, position: int, theta: float = 10000.0) -> Tensor:
    """(R,) rotated half-split by a position."""
    half = len(x) // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean() + 1e-6).sqrt()


def attended(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """softmax(q . k / sqrt(d)) v; zeros of the values' width where there is none."""
    logits = torch.stack([q @ k for k in keys]) / math.sqrt(len(q))
    return (logits.softmax(0)[:, None] * torch.stack(values)).sum(0)


def pooled(block: Tensor, score: Tensor, places: Tensor) -> Tensor:
    """sum_j softmax_j(W c_j + B_j) c_j, every channel for itself."""
    return ((block @ score.T + places).softmax(0) * block).sum(0)


def hybrid(state: dict[str, Tensor], config, x: Tensor, chosen: list[list[int]]) -> Tensor:
    """x (T, D) -> (T, D), by the weights of a HybridMixer. `chosen[t]` are the places of the tokens
    that the select branch attends to (its indexer has tests of its own).
    """
    heads, nope, rope = config.heads, config.nope_dim, config.rope_dim
    out = []
    for t in range(len(x)):
        source = rms(state["queries.down.weight"] @ x[t], state["queries.norm.weight"])
        q = (state["queries.up.weight"] @ source).view(heads, nope + rope)
        q = [torch.cat((head[:nope], turned(head[nope:], t))) for head in q]
        output = {}
        for name in config.branch_names:
            branch = {key.removeprefix(f"branches.{name}."): value for key, value in state.items()}
            if name == "compress":
                output[name] = [_compress(branch, config, x, t, q[h], h) for h in range(heads)]
            else:
                seen = range(max(0, t - config.window + 1), t + 1)
                places = chosen[t] if name == "select" else seen
                output[name] = [_own(branch, config, x, places, q[h], h) for h in range(heads)]
        scores = (state["branch_gate.weight"] @ x[t] + state["branch_gate.bias"]).view(heads, -1)
        gates = scores.softmax(1) if config.gate == "softmax" else scores.sigmoid()
        mixed = [
            sum(gates[h, z] * output[name][h] for z, name in enumerate(config.branch_names))
            for h in range(heads)
        ]
        out.append(state["o_proj.weight"] @ torch.cat(mixed))
    return torch.stack(out)


def _compress(branch, config, x: Tensor, t: int, q: Tensor, h: int) -> Tensor:
    keys, values, size = [], [], config.compress_block
    both = branch["keys.up.weight"].view(config.heads, -1, config.kv_rank)[h]
    for begin in range(0, len(x), size):
        if begin + size - 1 > t:
            break
        down = x[begin : begin + size] @ branch["keys.down.weight"].T
        latents = torch.stack(
            [rms(c, branch["keys.norm.weight"]) for c in down[:, : config.kv_rank]]
        )
        latent = pooled(latents, branch["pool_latent.score.weight"], branch["pool_latent.places"])
        key = pooled(
            down[:, config.kv_rank :], branch["pool_key.score.weight"], branch["pool_key.places"]
        )
        up = both @ latent
        keys.append(torch.cat((up[: config.nope_dim], turned(key, begin + size - 1))))
        values.append(up[config.nope_dim :])
    return attended(q, keys, values) if keys else x.new_zeros(config.v_dim)


def _own(branch, config, x: Tensor, places, q: Tensor, h: int) -> Tensor:
    keys, values = [], []
    for s in places:
        key = (branch["keys.k.weight"] @ x[s]).view(config.heads, -1)[h]
        keys.append(torch.cat((key[: config.nope_dim], turned(key[config.nope_dim :], s))))
        values.append((branch["keys.v.weight"] @ x[s]).view(config.heads, -1)[h])
    return attended(q, keys, values)

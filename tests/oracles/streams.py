"""Residuals of several streams written out one number at a time, from the papers, for one token.

The state is a list of n streams, each a list of D numbers (0-d tensors, so that gradients flow).
Each function takes the sub-layer as a plain function of such a list and gives the state after it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Numbers = list[Tensor]
Matrix = list[list[Tensor]]


def rms_normed(x: Numbers, eps: float) -> Numbers:
    """x / sqrt(mean(x^2) + eps)."""
    mean = sum(number * number for number in x) / len(x)
    return [number / (mean + eps) ** 0.5 for number in x]


def along(x: Numbers, weight: Matrix, column: int) -> Tensor:
    """The number `column` of x W."""
    return sum(number * row[column] for number, row in zip(x, weight, strict=True))


def hyper(
    streams: list[Numbers],
    layer: Callable[[Numbers], Numbers],
    fracs: int,
    static: tuple[Matrix, Matrix, Matrix],
    dynamic: tuple[Matrix, Matrix, Matrix, Tensor, Tensor] | None,
    eps: float,
) -> list[Numbers]:
    """Hyper-Connections (2409.19606, equations 2 and 11 to 14) on the pieces of 2503.14125.

    Every stream is cut into `fracs` pieces of D / fracs numbers; piece f of stream s is number
    s fracs + f. Into piece f of the layer's input goes A_m[p][f] times piece p; into piece q of
    the state A_r[p][q] times piece p, and B[s fracs + g][f] times piece g of the layer's output,
    for q = s fracs + f.
    """
    width = len(streams[0]) // fracs
    pieces = [x[f * width : (f + 1) * width] for x in streams for f in range(fracs)]
    count = len(pieces)
    into, keep, back = [[list(row) for row in matrix] for matrix in static]
    if dynamic is not None:
        w_into, w_keep, w_back, mixing, writing = dynamic
        for p in range(count):
            normed = rms_normed(pieces[p], eps)
            for f in range(fracs):
                into[p][f] = mixing * torch.tanh(along(normed, w_into, f)) + into[p][f]
                back[p][f] = writing * torch.tanh(along(normed, w_back, f)) + back[p][f]
            for q in range(count):
                keep[p][q] = mixing * torch.tanh(along(normed, w_keep, q)) + keep[p][q]
    x = [
        sum(into[p][f] * pieces[p][i] for p in range(count))
        for f in range(fracs)
        for i in range(width)
    ]
    y = layer(x)
    after = []
    for s in range(len(streams)):
        stream = []
        for f in range(fracs):
            for i in range(width):
                kept = sum(keep[p][s * fracs + f] * pieces[p][i] for p in range(count))
                output = sum(back[s * fracs + g][f] * y[g * width + i] for g in range(fracs))
                stream.append(kept + output)
        after.append(stream)
    return after


def doubly_stochastic(logits: Matrix, iterations: int) -> Matrix:
    """Sinkhorn and Knopp (1967): exp, then `iterations` times columns and rows that sum to 1."""
    found = [[torch.exp(number) for number in row] for row in logits]
    size = len(found)
    for _ in range(iterations):
        columns = [sum(found[t][s] for t in range(size)) for s in range(size)]
        found = [[found[t][s] / columns[s] for s in range(size)] for t in range(size)]
        found = [[number / sum(row) for number in row] for row in found]
    return found


def mhyper(
    streams: list[Numbers],
    layer: Callable[[Numbers], Numbers],
    weights: tuple[Matrix, Matrix, Matrix],
    scales: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Numbers, Numbers, Matrix],
    iterations: int,
    temperature: float,
    eps: float,
) -> list[Numbers]:
    """Manifold-constrained Hyper-Connections (2512.24880, equations 5 to 9).

    v = RMSNorm(vec(X)); H_pre = sigmoid(a_pre v W_pre + b_pre), H_post = 2 sigmoid(a_post v W_post
    + b_post), H_res = Sinkhorn(a_res mat(v W_res) + b_res); X' = H_res X + H_post^T F(H_pre X).
    """
    n, width = len(streams), len(streams[0])
    v = rms_normed([number for x in streams for number in x], eps)
    w_pre, w_post, w_res = weights
    a_pre, a_post, a_res = scales
    b_pre, b_post, b_res = biases
    pre = [torch.sigmoid(a_pre * along(v, w_pre, s) + b_pre[s]) for s in range(n)]
    post = [2 * torch.sigmoid(a_post * along(v, w_post, s) + b_post[s]) for s in range(n)]
    logits = [
        [(a_res * along(v, w_res, t * n + s) + b_res[t][s]) / temperature for s in range(n)]
        for t in range(n)
    ]
    res = doubly_stochastic(logits, iterations)
    y = layer([sum(pre[s] * streams[s][i] for s in range(n)) for i in range(width)])
    return [
        [sum(res[t][s] * streams[s][i] for s in range(n)) + post[t] * y[i] for i in range(width)]
        for t in range(n)
    ]

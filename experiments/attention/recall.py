"""Recall: key-value pairs are hidden among filler tokens, and later keys query their values.

One pair is a needle; several are multi-query associative recall (Arora et al., 2312.04927). Every
sequence is generated anew, so that the task measures attention and not memorisation. A sequence is

    filler k1 v1 filler filler k2 v2 ... filler | k2 v2 k1 v1 k2 v2

and only the values after the bar are predicted and counted. Queries repeat keys, so that a value
that has not been queried yet is no better guess than any other.

Legend: B rows, T tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith import LM
from tinsmith.optim.build import Optimizers
from tinsmith.optim.config import OptimConfig
from tinsmith.optim.schedule import lr_multiplier

KEYS, FILLERS = 32, 32
VOCABULARY = 2 * KEYS + FILLERS
PAIRS, QUERIES, TOKENS = 8, 8, 1024
# Models learn to look up one of several pairs in short sequences, and keep it in long ones. Single
# pairs are only evaluated: in training a model would learn to name the only value that occurs.
SHORT, LENGTHS = (4, 8, 16), (4, 8, 16, 32, 64, 128)
LR_SCALE = 0.5
"""Factor of the default learning rates."""
EMBEDDING = 0.125
"""Initial standard deviation of embeddings. With the default of 0.02, which is small compared with
the output of the first layer, no mixer learns to look up (LOG.md).
"""


def make_sequences(
    count: int,
    length: int,
    pairs: int,
    generator: torch.Generator,
    queries: int = 1,
    depth: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ids (B, T), T = length + 2 queries, and positions of the queried values (B, queries).

    Keys are at even positions. `depth` 0 puts a single pair at the beginning, 1 at the end of the
    first `length` tokens; None puts pairs at random positions.
    """
    ids = torch.randint(2 * KEYS, VOCABULARY, (count, length + 2 * queries), generator=generator)
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(KEYS, 2 * KEYS, (count, pairs), generator=generator)
    if depth is None:
        positions = 2 * torch.rand(count, length // 2, generator=generator).argsort(1)[:, :pairs]
    else:
        positions = torch.full((count, 1), 2 * round(depth * (length // 2 - 1)))
    ids.scatter_(1, positions, keys)
    ids.scatter_(1, positions + 1, values)
    selected = torch.randint(pairs, (count, queries), generator=generator)
    query_positions = length + 2 * torch.arange(queries).expand(count, -1)
    ids.scatter_(1, query_positions, keys.gather(1, selected))
    ids.scatter_(1, query_positions + 1, values.gather(1, selected))
    return ids, query_positions + 1


def pick(choices: Sequence[int], generator: torch.Generator) -> int:
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def learn(lm: LM, steps: int, seed: int) -> float:
    """Train on 2 to 8 pairs in 4 to 128 tokens, in the first half of the steps on short sequences
    only. Return the mean loss of the last tenth of the steps.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(lm.embed.weight, std=EMBEDDING)
    config = OptimConfig()
    optimizers = Optimizers.build(lm.train(), None, config)
    losses = []
    for step in range(steps):
        length = pick(SHORT if 2 * step < steps else LENGTHS, generator)
        pairs = pick(range(2, min(PAIRS, length // 2) + 1), generator)
        ids, positions = make_sequences(TOKENS // length, length, pairs, generator, QUERIES)
        out = lm(ids)
        logits = out.logits.gather(1, (positions - 1)[..., None].expand(-1, -1, VOCABULARY))
        loss = F.cross_entropy(logits.flatten(0, 1), ids.gather(1, positions).flatten())
        (loss + sum(out.losses.values())).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizers.set_lr_multiplier(LR_SCALE * lr_multiplier(config.schedule, step, steps))
        optimizers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    last = losses[-max(steps // 10, 1) :]
    return sum(last) / len(last)


@torch.no_grad()
def accuracy(lm: LM, length: int, pairs: int, depth: float | None = None) -> float:
    """Return the share of right values in 512 new sequences."""
    ids, positions = make_sequences(
        512, length, pairs, torch.Generator().manual_seed(10**6), depth=depth
    )
    predicted = lm.eval()(ids).logits.argmax(-1).gather(1, positions - 1)
    return (predicted == ids.gather(1, positions)).double().mean().item()

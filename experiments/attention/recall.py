"""Recall: pairs of a key and a value are hidden among filler; later keys ask for their values.

One pair is a needle; several are multi-query associative recall (Arora et al., 2312.04927). Every
sequence is drawn anew, so what is measured is looking back, not memory. A row is

    filler k1 v1 filler filler k2 v2 ... filler | k2 v2 k1 v1 k2 v2

and only the values after the bar are predicted and counted. Keys are asked for with repetition, so
that naming a value that was not asked for yet is no better than guessing among all of them.

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
PAIRS, ASKS, TOKENS = 8, 8, 1024
# Looking up one of several pairs is learned in short rows, then kept in long ones. One pair alone
# is only examined: to name the only value there is would be learned instead of looking up.
SHORT, LENGTHS = (4, 8, 16), (4, 8, 16, 32, 64, 128)
PACE = 0.5
"""Of the usual learning rates."""
EMBEDDING = 0.125
"""Standard deviation of embeddings at first. From the house's 0.02, which is small beside what the
first layer writes, no mixer learns to look up (LOG.md).
"""


def rows(
    count: int,
    length: int,
    pairs: int,
    source: torch.Generator,
    asks: int = 1,
    depth: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Ids (B, T), T = length + 2 asks, and where the values that are asked for stand (B, asks).

    Keys stand at even places. `depth`: 0 puts a single pair at the beginning, 1 at the end of the
    first `length` tokens; None puts pairs anywhere.
    """
    ids = torch.randint(2 * KEYS, VOCABULARY, (count, length + 2 * asks), generator=source)
    keys = torch.rand(count, KEYS, generator=source).argsort(1)[:, :pairs]
    values = torch.randint(KEYS, 2 * KEYS, (count, pairs), generator=source)
    if depth is None:
        places = 2 * torch.rand(count, length // 2, generator=source).argsort(1)[:, :pairs]
    else:
        places = torch.full((count, 1), 2 * round(depth * (length // 2 - 1)))
    ids.scatter_(1, places, keys)
    ids.scatter_(1, places + 1, values)
    chosen = torch.randint(pairs, (count, asks), generator=source)
    requested = length + 2 * torch.arange(asks).expand(count, -1)
    ids.scatter_(1, requested, keys.gather(1, chosen))
    ids.scatter_(1, requested + 1, values.gather(1, chosen))
    return ids, requested + 1


def pick(choices: Sequence[int], source: torch.Generator) -> int:
    return choices[int(torch.randint(len(choices), (), generator=source))]


def learn(lm: LM, steps: int, seed: int) -> float:
    """Train on 2 to 8 pairs in 4 to 128 tokens, the first half of the steps in the short ones; the
    mean loss of the last tenth."""
    source = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(lm.embed.weight, std=EMBEDDING)
    config = OptimConfig()
    optimizers = Optimizers.build(lm.train(), None, config)
    losses = []
    for step in range(steps):
        length = pick(SHORT if 2 * step < steps else LENGTHS, source)
        pairs = pick(range(2, min(PAIRS, length // 2) + 1), source)
        ids, where = rows(TOKENS // length, length, pairs, source, ASKS)
        out = lm(ids)
        output = out.logits.gather(1, (where - 1)[..., None].expand(-1, -1, VOCABULARY))
        loss = F.cross_entropy(output.flatten(0, 1), ids.gather(1, where).flatten())
        (loss + sum(out.losses.values())).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizers.set_lr_multiplier(PACE * lr_multiplier(config.schedule, step, steps))
        optimizers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    last = losses[-max(steps // 10, 1) :]
    return sum(last) / len(last)


@torch.no_grad()
def accuracy(lm: LM, length: int, pairs: int, depth: float | None = None) -> float:
    """Share of values that are said right, of 512 fresh rows."""
    ids, where = rows(512, length, pairs, torch.Generator().manual_seed(10**6), depth=depth)
    output = lm.eval()(ids).logits.argmax(-1).gather(1, where - 1)
    return (output == ids.gather(1, where)).double().mean().item()

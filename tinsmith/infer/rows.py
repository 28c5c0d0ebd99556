"""What the engine remembers of its requests, and prompts on their way into caches."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinsmith.infer.sample import Sampling
from tinsmith.nn.model import LM

CHUNK = 512
"""Positions of a prompt that are taken in per step; other rows go on meanwhile."""


@dataclass(eq=False)
class Request:
    """One answer: waiting, then a row, then over (`gone`)."""

    number: int
    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    room: int
    """How many tokens it may have."""
    stops: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    gone: bool = False

    @property
    def held(self) -> int:
        """Tokens in its cache once it has a row: the newest is not yet."""
        return len(self.prompt) + max(len(self.tokens) - 1, 0)


class Prefill:
    """Prompts of similar length on their way into caches of their own, padded on the left.

    Requests with the same prompt share one row of them.
    """

    def __init__(self, lm: LM, members: Sequence[Request], capacity: int):
        self.members = list(members)
        self.capacity = capacity
        self.prompts = list(dict.fromkeys(member.prompt for member in members))
        self.caches = lm.new_caches(len(self.prompts), capacity)
        self._lm = lm
        self._begin = 0
        width, device = max(map(len, self.prompts)), lm.embed.weight.device
        padded = [[0] * (width - len(ids)) + list(ids) for ids in self.prompts]
        segments = [[-1] * (width - len(ids)) + [0] * len(ids) for ids in self.prompts]
        self._ids = torch.tensor(padded, device=device)
        ragged = any(len(ids) < width for ids in self.prompts)
        self._segments = torch.tensor(segments, device=device) if ragged else None

    def advance(self) -> Tensor | None:
        """Take in a chunk: the prompts' (P, V) logits after the last one, None before."""
        part = slice(self._begin, self._begin + CHUNK)
        self._begin += CHUNK
        last = self._begin >= self._ids.shape[1]
        out = self._lm(
            self._ids[:, part],
            segments=None if self._segments is None else self._segments[:, part],
            caches=self.caches,
            logits="last" if last else False,
        )
        return out.logits[:, -1] if last else None

    def row(self, member: Request) -> int:
        """The row of `caches` that a member goes on from."""
        return self.prompts.index(member.prompt)


def similar(members: Sequence[Request], new: Request) -> bool:
    """With this one too, at least half of the positions would be tokens and not padding."""
    lengths = [len(prompt) for prompt in {member.prompt for member in (*members, new)}]
    return max(lengths) * len(lengths) <= 2 * sum(lengths)

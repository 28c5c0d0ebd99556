"""What the engine remembers of its requests, and prompts on their way into caches."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinsmith.infer.sample import SamplingParams
from tinsmith.nn.model import LM

PREFILL_CHUNK_SIZE = 512
"""Positions of a prompt that are taken in per step; other rows go on meanwhile."""


@dataclass(eq=False)
class RequestState:
    """One answer: waiting, then a row, then over (`finished`)."""

    request_id: int
    prompt: tuple[int, ...]
    sampling_params: SamplingParams
    seed: int
    max_new_tokens: int
    """How many tokens it may have."""
    stop_token_ids: frozenset[int]
    output_ids: list[int] = field(default_factory=list)
    finished: bool = False

    @property
    def num_cached_tokens(self) -> int:
        """Tokens in its cache once it has a row: the newest is not yet."""
        return len(self.prompt) + max(len(self.output_ids) - 1, 0)


class Prefill:
    """Prompts of similar length on their way into caches of their own, padded on the left.

    Requests with the same prompt share one row of them.
    """

    def __init__(self, lm: LM, requests: Sequence[RequestState], capacity: int):
        self.requests = list(requests)
        self.capacity = capacity
        self.prompts = list(dict.fromkeys(member.prompt for member in requests))
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
        part = slice(self._begin, self._begin + PREFILL_CHUNK_SIZE)
        self._begin += PREFILL_CHUNK_SIZE
        last = self._begin >= self._ids.shape[1]
        out = self._lm(
            self._ids[:, part],
            segments=None if self._segments is None else self._segments[:, part],
            caches=self.caches,
            logits="last" if last else False,
        )
        return out.logits[:, -1] if last else None

    def row(self, request: RequestState) -> int:
        """The row of `caches` that a member goes on from."""
        return self.prompts.index(request.prompt)


def has_similar_length(requests: Sequence[RequestState], candidate: RequestState) -> bool:
    """With this one too, at least half of the positions would be tokens and not padding."""
    lengths = [len(prompt) for prompt in {member.prompt for member in (*requests, candidate)}]
    return max(lengths) * len(lengths) <= 2 * sum(lengths)

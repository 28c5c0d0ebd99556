"""State of the engine's requests, and the prefill of their prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinsmith.infer.sample import SamplingParams
from tinsmith.nn.model import LM

PREFILL_CHUNK_SIZE = 512
"""Prompt positions that are prefilled in one step, between two decoding steps of other requests."""


@dataclass(eq=False)
class RequestState:
    """One request: waiting, then decoding, then `finished`."""

    request_id: int
    prompt: tuple[int, ...]
    sampling_params: SamplingParams
    seed: int
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    output_ids: list[int] = field(default_factory=list)
    finished: bool = False

    @property
    def num_cached_tokens(self) -> int:
        """Tokens in the KV cache while it decodes. The newest token is not cached yet."""
        return len(self.prompt) + max(len(self.output_ids) - 1, 0)


class Prefill:
    """Computes the caches of prompts of similar length, padded on the left, chunk by chunk.

    Requests with equal prompts share one row.
    """

    def __init__(self, lm: LM, requests: Sequence[RequestState], capacity: int):
        self.requests = list(requests)
        self.capacity = capacity
        self.prompts = list(dict.fromkeys(request.prompt for request in requests))
        self.caches = lm.new_caches(len(self.prompts), capacity)
        self._lm = lm
        self._start = 0
        width, device = max(map(len, self.prompts)), lm.embed.weight.device
        padded = [[0] * (width - len(ids)) + list(ids) for ids in self.prompts]
        segments = [[-1] * (width - len(ids)) + [0] * len(ids) for ids in self.prompts]
        self._ids = torch.tensor(padded, device=device)
        ragged = any(len(ids) < width for ids in self.prompts)
        self._segments = torch.tensor(segments, device=device) if ragged else None

    def advance(self) -> Tensor | None:
        """Prefill one chunk. Return the logits (P, V) after the last chunk, otherwise None."""
        chunk = slice(self._start, self._start + PREFILL_CHUNK_SIZE)
        self._start += PREFILL_CHUNK_SIZE
        is_last = self._start >= self._ids.shape[1]
        out = self._lm(
            self._ids[:, chunk],
            segments=None if self._segments is None else self._segments[:, chunk],
            caches=self.caches,
            logits="last" if is_last else False,
        )
        return out.logits[:, -1] if is_last else None

    def row(self, request: RequestState) -> int:
        """Return the row of `caches` that contains the request's prompt."""
        return self.prompts.index(request.prompt)


def has_similar_length(requests: Sequence[RequestState], candidate: RequestState) -> bool:
    """Return True if at most half of the positions are padding when the candidate is prefilled
    together with these requests.
    """
    prompts = {request.prompt for request in (*requests, candidate)}
    lengths = [len(prompt) for prompt in prompts]
    return max(lengths) * len(lengths) <= 2 * sum(lengths)

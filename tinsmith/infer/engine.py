"""Continuous batching: decode requests of different lengths together, while requests come and go.

    step: decode one token for every running request; remove finished requests; prefill a chunk of
    the waiting prompts, then let them join the batch with their first token

The engine reads and returns token ids only; `infer.completions` turns them into text. A step is
short, so that the caller can cancel requests between steps. Row i of the caches belongs to
`_running[i]`. The engine selects and joins cache rows and never looks into a cache. Caches grow
with the longest row: they are joined to empty caches of twice the capacity.
"""

import copy
import math
import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinsmith.core.errors import UserError
from tinsmith.infer.onednn_weights import prepack_weights, refresh_prepacked
from tinsmith.infer.requests import Prefill, RequestState, has_similar_length
from tinsmith.infer.sample import SamplingParams, sample, stack_sampling_params, uniform
from tinsmith.nn.contract import LayerCache
from tinsmith.nn.model import LM

INITIAL_CACHE_LEN = 256
"""Tokens per row that caches have room for at first. The capacity then doubles."""
MIN_FREE_DIVISOR = 16
"""While requests decode, waiting prompts join only when `max_batch_size` over this many rows are
free, because joining copies the caches of all rows.
"""
NONFINITE_LOGITS = (
    "logits are NaN or infinite: the model's weights are broken, or too large for their dtype"
)
"""Message for a request that ended with `finish_reason` `error`."""


class Event(NamedTuple):
    """The next token of one request, or its failure."""

    request_id: int
    token: int | None
    """None if the request failed."""
    logprob: float | None
    """Log-probability of the token at the request's temperature (at 1 if greedy), without penalty
    and truncation. None if the request failed.
    """
    finish_reason: str | None
    """`stop` after a stop token, `length` after the last token that fits, `error` if the logits of
    this request are NaN or infinite (`NONFINITE_LOGITS`), otherwise None.
    """


class Engine:
    """Decodes requests with `lm`, at most `max_batch_size` at a time. The model must be in eval
    mode.

    `max_seq_len`: maximum tokens per request, prompt included; capped at, and by default equal to,
    the model's `max_seq_len`. `eos_ids`: tokens that end every request. `dtype`: decode with a copy
    of the weights in this precision. On a CPU the weights are stored twice (`onednn_weights`).
    Weights may change while no request is running. Not thread-safe.
    """

    def __init__(
        self,
        lm: LM,
        *,
        max_batch_size: int = 8,
        max_seq_len: int | None = None,
        eos_ids: Sequence[int] = (),
        dtype: torch.dtype | None = None,
    ):
        for name, value in (("max_batch_size", max_batch_size), ("max_seq_len", max_seq_len)):
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        same_dtype = dtype is None or dtype == lm.embed.weight.dtype
        self.lm = lm if same_dtype else copy.deepcopy(lm).to(dtype)
        self._decode_model = prepack_weights(self.lm)
        self.max_batch_size = max_batch_size
        model_limit = lm.config.max_seq_len
        self.max_seq_len = model_limit if max_seq_len is None else min(max_seq_len, model_limit)
        self._eos_ids = frozenset(eos_ids)
        self._num_requests = 0
        self._waiting: deque[RequestState] = deque()
        self._prefill: Prefill | None = None
        self._last_prefill: tuple[Prefill, Tensor] | None = None
        """The newest prefill and its logits, while the next waiting request has the same prompt."""
        self._clear()

    @property
    def num_active(self) -> int:
        """Number of requests that decode or whose prompt is being prefilled."""
        return sum(not request.finished for request in self._active())

    @property
    def num_waiting(self) -> int:
        """Number of requests whose prefill has not begun."""
        return len(self._waiting)

    def nbytes(self) -> int:
        """Return the bytes of the caches of all running requests."""
        return sum(cache.nbytes() for cache in self._caches)

    def add(
        self,
        prompt: Sequence[int],
        sampling_params: SamplingParams,
        max_new_tokens: int,
        stop_token_ids: Sequence[int] = (),
    ) -> int:
        """Queue a request and return its id.

        The request ends after `max_new_tokens` tokens, at `max_seq_len`, or with a token of
        `eos_ids` or `stop_token_ids`. Raise UserError if the prompt is empty, contains ids outside
        of the vocabulary, or leaves no room for a token.
        """
        self._check(prompt, max_new_tokens)
        request_id, self._num_requests = self._num_requests, self._num_requests + 1
        seed = secrets.randbits(63) if sampling_params.seed is None else sampling_params.seed
        limit = min(max_new_tokens, self.max_seq_len - len(prompt))
        stop = self._eos_ids.union(stop_token_ids)
        self._waiting.append(
            RequestState(request_id, tuple(prompt), sampling_params, seed, limit, stop)
        )
        return request_id

    def add_group(
        self,
        prompt: Sequence[int],
        sampling_params: Sequence[SamplingParams],
        max_new_tokens: int,
        stop_token_ids: Sequence[int] = (),
    ) -> list[int]:
        """Queue one request per element of `sampling_params` and return their ids.

        Consecutive requests with equal prompts are prefilled once.
        """
        return [
            self.add(prompt, params, max_new_tokens, stop_token_ids) for params in sampling_params
        ]

    def cancel(self, request_id: int) -> None:
        """End a request without another event. A finished or unknown id changes nothing."""
        for request in (*self._waiting, *self._active()):
            if request.request_id == request_id:
                request.finished = True
        self._waiting = deque(request for request in self._waiting if not request.finished)

    def run(self) -> Iterator[Event]:
        """Yield events until every request has ended. Requests may be added meanwhile."""
        while self.num_active or self.num_waiting:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Decode one token for every running request, and a first one after a finished prefill."""
        if self.lm.training:
            raise ValueError("the engine needs a model in eval mode: call lm.eval()")
        self._remove_finished()
        if not self._active():
            self._decode_model = refresh_prepacked(self._decode_model, self.lm)
        logits = [self._decode()] if self._running else []
        logits += self._advance_prefill()
        events = self._sample(torch.cat(logits)) if logits else []
        self._remove_finished()
        return events

    def _check(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        size = self.lm.config.vocab_size
        if not prompt:
            raise UserError("the prompt has no tokens: begin with the end-of-text token")
        if min(prompt) < 0 or max(prompt) >= size:
            raise UserError(f"the prompt has ids outside 0..{size - 1}: another tokenizer's?")
        if len(prompt) >= self.max_seq_len:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, and prompt and completion together may have "
                f"{self.max_seq_len}: shorten the prompt"
            )
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")

    def _active(self) -> tuple[RequestState, ...]:
        return (*self._running, *(self._prefill.requests if self._prefill else ()))

    def _decode(self) -> Tensor:
        """Return the logits (B, V) after the newest token of every row."""
        longest = max(request.num_cached_tokens for request in self._running) + 1
        if longest > self._cache_len:
            self._cache_len = self._cache_len_for(longest)
            enlarged = self.lm.new_caches(0, self._cache_len)
            for new, old in zip(enlarged, self._caches, strict=True):
                new.join(old)
            self._caches = enlarged
        out = self._decode_model(self._last_tokens_B[:, None], caches=self._caches, logits="last")
        return out.logits[:, -1]

    def _advance_prefill(self) -> list[Tensor]:
        """Prefill the next chunk of the waiting prompts. When it is the last chunk, their requests
        join the batch and their logits (M, V) are returned.
        """
        if self._prefill is None:
            admitted = self._admit()
            if not admitted:
                return []
            if self._last_prefill is not None:
                return [self._join_batch(admitted, *self._last_prefill)]
            longest = max(len(request.prompt) for request in admitted)
            self._prefill = Prefill(self._decode_model, admitted, self._cache_len_for(longest + 1))
        prefill = self._prefill
        logits = prefill.advance()
        if logits is None:
            return []
        self._prefill = None
        self._last_prefill = (prefill, logits) if self._next_repeats(prefill) else None
        requests = [request for request in prefill.requests if not request.finished]
        return [self._join_batch(requests, prefill, logits)] if requests else []

    def _admit(self) -> list[RequestState]:
        """Take waiting requests to prefill together: prompts of similar length, or the prompts of
        the last prefill again.
        """
        free = self.max_batch_size - len(self._running)
        if self._running and free < min(
            len(self._waiting), self.max_batch_size // MIN_FREE_DIVISOR
        ):
            return []
        if self._last_prefill is not None and not self._next_repeats(self._last_prefill[0]):
            self._last_prefill = None
        admitted: list[RequestState] = []
        while self._waiting and len(admitted) < free:
            candidate = self._waiting[0]
            if not (
                candidate.prompt in self._last_prefill[0].prompts
                if self._last_prefill
                else has_similar_length(admitted, candidate)
            ):
                break
            admitted.append(self._waiting.popleft())
        return admitted

    def _next_repeats(self, prefill: Prefill) -> bool:
        """Return True if the next waiting request has a prompt of this prefill."""
        return bool(self._waiting) and self._waiting[0].prompt in prefill.prompts

    def _join_batch(
        self, requests: list[RequestState], prefill: Prefill, logits_PV: Tensor
    ) -> Tensor:
        """Append the caches of prefilled requests to the batch and return their logits (M, V)."""
        prompt_rows = [prefill.row(request) for request in requests]
        index_M = torch.tensor(prompt_rows, device=logits_PV.device)
        count = len(self._running)
        rows = torch.cat((torch.arange(count, device=logits_PV.device), count + index_M))
        is_whole_prefill = prompt_rows == list(range(len(prefill.prompts)))
        for cache, prefilled in zip(self._caches, prefill.caches, strict=True):
            cache.join(prefilled)
            if not is_whole_prefill:
                cache.select(rows)
        self._cache_len = max(self._cache_len, prefill.capacity)
        self._running += requests
        self._stack_row_settings()
        return logits_PV[index_M]

    def _sample(self, logits_BV: Tensor) -> list[Event]:
        """Draw the next token of every row."""
        draws = None
        if not self._sampling.all_greedy:
            numbers = [uniform(row.seed, len(row.output_ids)) for row in self._running]
            draws = torch.tensor(numbers, dtype=torch.float64, device=logits_BV.device)
        ids_B, logprobs_B = sample(logits_BV, self._sampling, draws, self._seen_BV)
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, ids_B[:, None], True)
        self._last_tokens_B = ids_B
        sampled = zip(self._running, ids_B.tolist(), logprobs_B.tolist(), strict=True)
        return [_append_token(request, token, logprob) for request, token, logprob in sampled]

    def _remove_finished(self) -> None:
        """Remove the rows of finished requests."""
        if not any(request.finished for request in self._running):
            return
        unfinished = [row for row, request in enumerate(self._running) if not request.finished]
        self._running = [self._running[row] for row in unfinished]
        if not unfinished:
            self._clear()
            return
        rows = torch.tensor(unfinished, device=self._last_tokens_B.device)
        self._last_tokens_B = self._last_tokens_B[rows]
        for cache in self._caches:
            cache.select(rows)
        self._stack_row_settings()

    def _clear(self) -> None:
        """Start with an empty batch and small caches."""
        self._running: list[RequestState] = []
        self._cache_len = self._cache_len_for(1)
        self._caches: list[LayerCache] = self.lm.new_caches(0, self._cache_len)
        self._stack_row_settings()

    def _stack_row_settings(self) -> None:
        """Stack what `sample` needs of every row: sampling parameters, and the tokens seen so far
        if a row has a repetition penalty.
        """
        device = self.lm.embed.weight.device
        params = [request.sampling_params for request in self._running]
        self._sampling = stack_sampling_params(params, device)
        self._seen_BV: Tensor | None = None
        if self._sampling.repetition_penalty is not None:
            shape = (len(self._running), self.lm.config.vocab_size)
            self._seen_BV = torch.zeros(shape, dtype=torch.bool, device=device)
            for row, request in enumerate(self._running):
                self._seen_BV[row, [*request.prompt, *request.output_ids]] = True

    def _cache_len_for(self, num_tokens: int) -> int:
        """Return the cache capacity for rows of `num_tokens` tokens."""
        length = INITIAL_CACHE_LEN
        while length < num_tokens:
            length *= 2
        return min(length, self.max_seq_len)


def _append_token(request: RequestState, token: int, logprob: float) -> Event:
    """Append a token to its request, which may end with it; end the request if it has no logits."""
    if not math.isfinite(logprob):
        request.finished = True
        return Event(request.request_id, None, None, "error")
    request.output_ids.append(token)
    finish_reason = "length" if len(request.output_ids) == request.max_new_tokens else None
    if token in request.stop_token_ids:
        finish_reason = "stop"
    request.finished = finish_reason is not None
    return Event(request.request_id, token, logprob, finish_reason)

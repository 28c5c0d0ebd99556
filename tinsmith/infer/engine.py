"""Many answers at once: rows of different lengths that come and go while the engine runs.

    step: every row decodes one token; rows that are over leave; waiting prompts are taken into
    caches, a chunk per step, and then get rows and their first tokens

It speaks ids only. A step is short, so whoever drives the engine can look for stop requests
between steps. Caches grow with the longest row and are never looked into: rows are selected and
joined, and move into larger caches by joining an empty one.
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
"""Tokens that rows have room for at first; then it doubles."""
MIN_FREE_DIVISOR = 16
"""While others decode, prompts wait until one row in so many is free for them: every time that rows
come, the caches of all are copied.
"""


class Event(NamedTuple):
    """One token of one request."""

    request_id: int
    token: int
    logprob: float
    """Of the model's own distribution at the row's temperature (at 1 for a greedy row)."""
    finish_reason: str | None
    """`stop` with a stop token, `length` with the last token there is room for, else None."""


class Engine:
    """Answers requests over `lm`, which must be in eval mode, `rows` of them at a time.

    `capacity`: most tokens of prompt and answer together; never, and by default not, less than
    the model's context allows. `eos`: ids that end every answer. `dtype`: decode with a copy of
    the weights in another precision. On a CPU the weights are held twice (see `packed`).
    Weights may change between answers, not while one is being made.
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
        same = dtype is None or dtype == lm.embed.weight.dtype
        self.lm = lm if same else copy.deepcopy(lm).to(dtype)
        self._decode_model = prepack_weights(self.lm)
        self.max_batch_size = max_batch_size
        context = lm.config.max_seq_len
        self.max_seq_len = context if max_seq_len is None else min(max_seq_len, context)
        self._eos = frozenset(eos_ids)
        self._requested = 0
        self._waiting: deque[RequestState] = deque()
        self._prefill: Prefill | None = None
        self._kept: tuple[Prefill, Tensor] | None = None
        self._clear()

    @property
    def num_active(self) -> int:
        """Requests that have a row, or whose prompt is being taken in."""
        return sum(not request.finished for request in self._running())

    @property
    def num_waiting(self) -> int:
        """Requests that there is no row for yet."""
        return len(self._waiting)

    def nbytes(self) -> int:
        """Bytes that the caches of all rows hold."""
        return sum(cache.nbytes() for cache in self._caches)

    def add(
        self,
        prompt: Sequence[int],
        sampling_params: SamplingParams,
        max_new_tokens: int,
        stop_token_ids: Sequence[int] = (),
    ) -> int:
        """Ask for an answer of at most `max_new` tokens, ended by `eos` or `stop_ids`; its number.

        UserError where the prompt is empty, has ids that the model does not know, or leaves no room
        for an answer.
        """
        self._check(prompt, max_new_tokens)
        number, self._requested = self._requested, self._requested + 1
        seed = secrets.randbits(63) if sampling_params.seed is None else sampling_params.seed
        room = min(max_new_tokens, self.max_seq_len - len(prompt))
        stops = self._eos.union(stop_token_ids)
        self._waiting.append(
            RequestState(number, tuple(prompt), sampling_params, seed, room, stops)
        )
        return number

    def add_group(
        self,
        prompt: Sequence[int],
        sampling_params: Sequence[SamplingParams],
        max_new_tokens: int,
        stop_token_ids: Sequence[int] = (),
    ) -> list[int]:
        """Ask for one answer per sampling; their numbers.

        As for any equal prompts that wait one after another, the prompt is taken in once.
        """
        return [
            self.add(prompt, sampling, max_new_tokens, stop_token_ids)
            for sampling in sampling_params
        ]

    def cancel(self, request_id: int) -> None:
        """Give a request up; its row is free at the next step. Nothing happens if it is over."""
        for request in (*self._waiting, *self._running()):
            if request.request_id == request_id:
                request.finished = True
        self._waiting = deque(request for request in self._waiting if not request.finished)

    def run(self) -> Iterator[Event]:
        """Events until every request is over; more may be added meanwhile."""
        while self.num_active or self.num_waiting:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """A token for every row, and a first one where a prompt is now behind it.

        RuntimeError where logits are not numbers; all that were running are over then.
        """
        if self.lm.training:
            raise ValueError("the engine needs a model in eval mode: call lm.eval()")
        self._sweep()
        if not self._running():
            self._decode_model = refresh_prepacked(self._decode_model, self.lm)
        logits = [self._decode()] if self._rows else []
        logits += self._take_in()
        events = self._choose(torch.cat(logits)) if logits else []
        self._sweep()
        return events

    def _check(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        size = self.lm.config.vocab_size
        if not prompt:
            raise UserError("the prompt has no tokens: begin with the end-of-text token")
        if min(prompt) < 0 or max(prompt) >= size:
            raise UserError(f"the prompt has ids outside 0..{size - 1}: another tokenizer's?")
        if len(prompt) >= self.max_seq_len:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, and there is room for {self.max_seq_len} "
                "with "
                "the answer: shorten it"
            )
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")

    def _running(self) -> tuple[RequestState, ...]:
        return (*self._rows, *(self._prefill.requests if self._prefill else ()))

    def _decode(self) -> Tensor:
        """(B, V): what comes after the newest token of every row."""
        longest = max(row.num_cached_tokens for row in self._rows) + 1
        if longest > self._room:
            self._room = self._roomy(longest)
            larger = self.lm.new_caches(0, self._room)
            for mine, theirs in zip(larger, self._caches, strict=True):
                mine.join(theirs)
            self._caches = larger
        out = self._decode_model(self._newest[:, None], caches=self._caches, logits="last")
        return out.logits[:, -1]

    def _take_in(self) -> list[Tensor]:
        """Go on with prompts that are on their way, or begin with those that wait; the (M, V)
        logits of new rows, if there are any now.
        """
        if self._prefill is None:
            members = self._admitted()
            if not members:
                return []
            if self._kept is not None:
                return [self._enter(members, *self._kept)]
            longest = max(len(member.prompt) for member in members)
            self._prefill = Prefill(self._decode_model, members, self._roomy(longest + 1))
        done = self._prefill
        logits = done.advance()
        if logits is None:
            return []
        self._prefill = None
        self._kept = (done, logits) if self._waits_for(done) else None
        members = [member for member in done.requests if not member.finished]
        return [self._enter(members, done, logits)] if members else []

    def _admitted(self) -> list[RequestState]:
        """Waiting requests to begin with: of a prompt that was kept, or of similar length."""
        free = self.max_batch_size - len(self._rows)
        if self._rows and free < min(len(self._waiting), self.max_batch_size // MIN_FREE_DIVISOR):
            return []
        if self._kept is not None and not self._waits_for(self._kept[0]):
            self._kept = None
        members: list[RequestState] = []
        while self._waiting and len(self._rows) + len(members) < self.max_batch_size:
            kept, new = self._kept, self._waiting[0]
            if not (new.prompt in kept[0].prompts if kept else has_similar_length(members, new)):
                break
            members.append(self._waiting.popleft())
        return members

    def _waits_for(self, done: Prefill) -> bool:
        """The next request has a prompt that was just taken in."""
        return bool(self._waiting) and self._waiting[0].prompt in done.prompts

    def _enter(self, members: list[RequestState], done: Prefill, logits: Tensor) -> Tensor:
        """Rows for requests whose prompts are in; of the prompts' (P, V) logits theirs, (M, V)."""
        at, count = [done.row(member) for member in members], len(self._rows)
        places = torch.tensor(at, device=logits.device)
        rows = torch.cat((torch.arange(count, device=logits.device), count + places))
        every = at == list(range(len(done.prompts)))
        for mine, theirs in zip(self._caches, done.caches, strict=True):
            mine.join(theirs)
            if not every:
                mine.select(rows)
        self._room = max(self._room, done.capacity)
        self._rows += members
        self._regroup()
        return logits[places]

    def _choose(self, logits: Tensor) -> list[Event]:
        """The next token of every row, from (B, V) logits."""
        draws = None
        if not self._settings.all_greedy:
            numbers = [uniform(row.seed, len(row.output_ids)) for row in self._rows]
            draws = torch.tensor(numbers, dtype=torch.float64, device=logits.device)
        ids, logprobs = sample(logits, self._settings, draws, self._seen)
        if self._seen is not None:
            self._seen.scatter_(1, ids[:, None], True)
        self._newest, reported = ids, logprobs.tolist()
        for row, logprob in zip(self._rows, reported, strict=True):
            if not math.isfinite(logprob):
                self._give_up(row)
        return [_event(*each) for each in zip(self._rows, ids.tolist(), reported, strict=True)]

    def _give_up(self, broken: RequestState) -> None:
        for request in self._running():
            request.finished = True
        length = len(broken.prompt) + len(broken.output_ids)
        raise RuntimeError(
            f"logits are NaN or infinite after {length} tokens of request {broken.request_id}: the "
            "model's weights are broken, or too large for their dtype"
        )

    def _sweep(self) -> None:
        """Rows that are over leave."""
        if not any(row.finished for row in self._rows):
            return
        kept = [place for place, row in enumerate(self._rows) if not row.finished]
        self._rows = [self._rows[place] for place in kept]
        if not kept:
            self._clear()
            return
        rows = torch.tensor(kept, device=self._newest.device)
        self._newest = self._newest[rows]
        for cache in self._caches:
            cache.select(rows)
        self._regroup()

    def _clear(self) -> None:
        """No rows, and little memory."""
        self._rows = []
        self._room = self._roomy(1)
        self._caches: list[LayerCache] = self.lm.new_caches(0, self._room)
        self._regroup()

    def _regroup(self) -> None:
        """What depends on which rows there are."""
        device = self.lm.embed.weight.device
        self._settings = stack_sampling_params([row.sampling_params for row in self._rows], device)
        self._seen: Tensor | None = None
        if self._settings.repetition_penalty is not None:
            shape = (len(self._rows), self.lm.config.vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=device)
            for place, row in enumerate(self._rows):
                self._seen[place, [*row.prompt, *row.output_ids]] = True

    def _roomy(self, tokens: int) -> int:
        """Room for `tokens` tokens and some more."""
        room = INITIAL_CACHE_LEN
        while room < tokens:
            room *= 2
        return min(room, self.max_seq_len)


def _event(row: RequestState, token: int, logprob: float) -> Event:
    """A request gets its next token, perhaps its last."""
    row.output_ids.append(token)
    finish = "length" if len(row.output_ids) == row.max_new_tokens else None
    if token in row.stop_token_ids:
        finish = "stop"
    row.finished = finish is not None
    return Event(row.request_id, token, logprob, finish)

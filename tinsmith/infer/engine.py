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
from tinsmith.infer.rows import Prefill, Request, copied, similar
from tinsmith.infer.sample import Sampling, Settings, sample, stack, uniform
from tinsmith.nn.contract import LayerCache
from tinsmith.nn.model import LM

ROOM = 256
"""Tokens that rows have room for at first; then it doubles."""


class Event(NamedTuple):
    """One token of one request."""

    number: int
    token: int
    logprob: float
    """Of the model's own distribution at the row's temperature (at 1 for a greedy row)."""
    finish: str | None
    """`stop` with a stop token, `length` with the last token there is room for, else None."""


class Engine:
    """Answers requests over `lm`, which must be in eval mode, `rows` of them at a time.

    `capacity`: most tokens of prompt and answer together; never, and by default not, less than
    the model's context allows. `eos`: ids that end every answer. `dtype`: decode with a copy of
    the weights in another precision (a CPU decodes one row faster in float32 than in bfloat16).
    """

    def __init__(
        self,
        lm: LM,
        *,
        rows: int = 8,
        capacity: int | None = None,
        eos: Sequence[int] = (),
        dtype: torch.dtype | None = None,
    ):
        for name, value in (("rows", rows), ("capacity", capacity)):
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        same = dtype is None or dtype == lm.embed.weight.dtype
        self.lm = lm if same else copy.deepcopy(lm).to(dtype)
        self.rows = rows
        context = lm.config.max_context
        self.capacity = context if capacity is None else min(capacity, context)
        self._eos = frozenset(eos)
        self._asked = 0
        self._waiting: deque[Request] = deque()
        self._prefill: Prefill | None = None
        self._kept: tuple[Prefill, Tensor] | None = None
        self._clear()

    @property
    def active(self) -> int:
        """Requests that have a row, or whose prompt is being taken in."""
        return sum(not request.gone for request in self._running())

    @property
    def waiting(self) -> int:
        """Requests that there is no row for yet."""
        return len(self._waiting)

    def nbytes(self) -> int:
        """Bytes that the caches of all rows hold."""
        return sum(cache.nbytes() for cache in self._caches)

    def add(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        max_new: int,
        stop_ids: Sequence[int] = (),
    ) -> int:
        """Ask for an answer of at most `max_new` tokens, ended by `eos` or `stop_ids`; its number.

        UserError where the prompt is empty, has ids that the model does not know, or leaves no room
        for an answer.
        """
        self._check(prompt, max_new)
        number, self._asked = self._asked, self._asked + 1
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        room = min(max_new, self.capacity - len(prompt))
        stops = self._eos.union(stop_ids)
        self._waiting.append(Request(number, tuple(prompt), sampling, seed, room, stops))
        return number

    def add_group(
        self,
        prompt: Sequence[int],
        samplings: Sequence[Sampling],
        max_new: int,
        stop_ids: Sequence[int] = (),
    ) -> list[int]:
        """Ask for one answer per sampling; their numbers.

        As for any equal prompts that wait one after another, the prompt is taken in once.
        """
        return [self.add(prompt, sampling, max_new, stop_ids) for sampling in samplings]

    def drop(self, number: int) -> None:
        """Give a request up; its row is free at the next step. Nothing happens if it is over."""
        for request in (*self._waiting, *self._running()):
            if request.number == number:
                request.gone = True
        self._waiting = deque(request for request in self._waiting if not request.gone)

    def run(self) -> Iterator[Event]:
        """Events until every request is over; more may be added meanwhile."""
        while self.active or self.waiting:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One token for every row that has its prompt behind it.

        RuntimeError where logits are not numbers; all that were running are over then.
        """
        if self.lm.training:
            raise ValueError("the engine needs a model in eval mode: call lm.eval()")
        self._sweep()
        events = self._decode() if self._rows else []
        self._sweep()
        events += self._take_in()
        self._sweep()
        return events

    def _check(self, prompt: Sequence[int], max_new: int) -> None:
        size = self.lm.config.vocab_size
        if not prompt:
            raise UserError("the prompt has no tokens: begin with the end-of-text token")
        if min(prompt) < 0 or max(prompt) >= size:
            raise UserError(f"the prompt has ids outside 0..{size - 1}: another tokenizer's?")
        if len(prompt) >= self.capacity:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, and there is room for {self.capacity} with "
                "the answer: shorten it"
            )
        if max_new < 1:
            raise UserError(f"max_new={max_new} must be at least 1")

    def _running(self) -> tuple[Request, ...]:
        return (*self._rows, *(self._prefill.members if self._prefill else ()))

    def _decode(self) -> list[Event]:
        """The next token of every row."""
        self._longest += 1
        if self._longest > self._room:
            self._room = self._roomy(self._longest)
            self._caches = copied(self.lm, self._caches, range(len(self._rows)), self._room)
        out = self.lm(self._newest[:, None], caches=self._caches, logits="last")
        self._newest, events = _choose(self._rows, out.logits[:, -1], self._settings, self._seen)
        return events

    def _take_in(self) -> list[Event]:
        """Go on with prompts that are on their way, or begin with those that wait."""
        if self._prefill is None:
            members = self._admitted()
            if self._kept is not None:
                return self._enter(members, *self._kept)
            if not members:
                return []
            longest = max(len(member.prompt) for member in members)
            self._prefill = Prefill(self.lm, members, max(self._room, self._roomy(longest + 1)))
        done = self._prefill
        logits = done.advance()
        if logits is None:
            return []
        self._prefill = None
        return self._enter([member for member in done.members if not member.gone], done, logits)

    def _admitted(self) -> list[Request]:
        """Waiting requests to begin with: of the prompt that was kept, or of similar length."""
        members: list[Request] = []
        if self._kept and not (self._waiting and self._waiting[0].prompt in self._kept[0].prompts):
            self._kept = None
        while self._waiting and len(members) < self.rows - len(self._rows):
            new = self._waiting[0]
            fits = new.prompt in self._kept[0].prompts if self._kept else similar(members, new)
            if not fits:
                break
            members.append(self._waiting.popleft())
        return members

"""Text completions over the engine: text increments, stop strings, one stream per request.

    engine = CompletionEngine(lm, tokenizer)
    stream = engine.add(prompt_ids, SamplingParams(), max_new_tokens=100, stop=["\\n\\n"])
    for increment in stream:
        print(increment.text, end="")

Several streams can be read in any order: a stream that is read runs the engine until it has an
increment, and the increments of other requests wait in their own streams. Not thread-safe.
"""

from collections import deque
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch

from tinsmith.core.errors import Failure
from tinsmith.infer.engine import NONFINITE_LOGITS, Engine, Event
from tinsmith.infer.sample import SamplingParams
from tinsmith.nn.model import LM
from tinsmith.text.stream import StopStrings, TextStream
from tinsmith.text.tokenizer import Tokenizer


class Increment(NamedTuple):
    """What one token adds to a completion."""

    text: str
    """Text that is final with this token, possibly empty: never a part of a character, and nothing
    that could still become a stop string.
    """
    token: int | None
    logprob: float | None
    """As in `Event.logprob`."""
    finish_reason: str | None
    """As in `Completion.finish_reason`; None before the end."""


class Completion(NamedTuple):
    """One completion of a prompt."""

    token_ids: list[int]
    """All sampled ids, including the stop token and the tokens of a stop string."""
    text: str
    """Text up to the stop token or stop string."""
    finish_reason: str
    """`stop` (stop token or stop string), `length`, `cancelled`, or `error` (NaN logits)."""
    logprobs: list[float]
    """One per id, as in `Event.logprob`."""


class CompletionBuilder:
    """Builds the text of one request from its events."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._text_stream = TextStream(tokenizer)
        self._stop_strings = StopStrings(stop)
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._text: list[str] = []
        self.finish_reason: str | None = None

    def push(self, event: Event) -> Increment:
        """Add one event. After a stop string `finish_reason` is set, and the caller cancels the
        request.
        """
        text = ""
        if event.token is not None and event.logprob is not None:
            self._token_ids.append(event.token)
            self._logprobs.append(event.logprob)
            if event.finish_reason != "stop":
                text = self._text_stream.push(event.token)
        if event.finish_reason is not None:
            text += self._text_stream.finish()
        text, found_stop = self._stop_strings.push(text)
        if found_stop:
            self.finish_reason = "stop"
        elif event.finish_reason is not None:
            text += self._stop_strings.finish()
            self.finish_reason = event.finish_reason
        self._text.append(text)
        return Increment(text, event.token, event.logprob, self.finish_reason)

    def completion(self) -> Completion:
        """Return the completion so far, with `cancelled` if it has not ended."""
        text = "".join(self._text)
        return Completion(self._token_ids, text, self.finish_reason or "cancelled", self._logprobs)


class CompletionStream:
    """The increments of one request. Iterate over it to run the engine until the request ends;
    leaving the iteration early cancels the request.
    """

    def __init__(self, engine: "CompletionEngine", request_id: int, builder: CompletionBuilder):
        self.request_id, self.builder = request_id, builder
        self._engine = engine
        self._unread: deque[Increment] = deque()

    @property
    def finish_reason(self) -> str | None:
        """Why the request ended, as in `Completion.finish_reason`. None while it runs."""
        return self.builder.finish_reason

    def push(self, event: Event) -> None:
        """Add one event of the engine; called by `CompletionEngine.step`."""
        self._unread.append(self.builder.push(event))

    def read(self) -> list[Increment]:
        """Return the increments since the last read without running the engine."""
        increments = list(self._unread)
        self._unread.clear()
        return increments

    def completion(self) -> Completion:
        """Return the completion so far."""
        return self.builder.completion()

    def cancel(self) -> None:
        """End the request without another increment. A finished request stays as it is."""
        self._engine.cancel(self.request_id)

    def text(self) -> Generator[str, None, None]:
        """Run the engine and yield the text in increments that are not empty.

        Raise Failure if the model's logits are NaN or infinite.
        """
        for increment in self:
            if increment.text:
                yield increment.text
        raise_on_error(self.completion())

    def __iter__(self) -> Generator[Increment, None, None]:
        try:
            while self._unread or self.finish_reason is None:
                if self._unread:
                    yield self._unread.popleft()
                else:
                    self._engine.step()
        finally:
            self.cancel()


class CompletionEngine:
    """An `Engine` with a tokenizer: prompts are ids, completions are text.

    Arguments are those of `Engine`. Requests end at the tokenizer's end-of-text and end-of-turn
    tokens.
    """

    def __init__(
        self,
        lm: LM,
        tokenizer: Tokenizer,
        *,
        max_batch_size: int = 8,
        max_seq_len: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.tokenizer = tokenizer
        self.engine = Engine(
            lm,
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            eos_ids=tokenizer.eos_ids,
            dtype=dtype,
        )
        self._streams: dict[int, CompletionStream] = {}

    @property
    def busy(self) -> bool:
        """True while any request is unfinished."""
        return bool(self._streams)

    def add(
        self,
        prompt: Sequence[int],
        sampling_params: SamplingParams,
        max_new_tokens: int,
        stop: Sequence[str] = (),
    ) -> CompletionStream:
        """Queue a request and return its stream. Raise UserError as `Engine.add` does, or for an
        empty stop string.
        """
        builder = CompletionBuilder(self.tokenizer, stop)
        request_id = self.engine.add(prompt, sampling_params, max_new_tokens)
        stream = CompletionStream(self, request_id, builder)
        self._streams[request_id] = stream
        return stream

    def step(self) -> None:
        """Run one step of the engine and hand every event to the stream of its request."""
        for event in self.engine.step():
            stream = self._streams[event.request_id]
            stream.push(event)
            if stream.finish_reason is not None:
                self.cancel(event.request_id)

    def cancel(self, request_id: int) -> None:
        """End a request. A finished or unknown id changes nothing."""
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.builder.finish_reason = stream.finish_reason or "cancelled"
            self.engine.cancel(request_id)


def raise_on_error(completion: Completion) -> None:
    """Raise Failure if the completion ended because of NaN or infinite logits."""
    if completion.finish_reason == "error":
        after = len(completion.token_ids)
        raise Failure(f"{NONFINITE_LOGITS} (after {after} tokens of a completion)")

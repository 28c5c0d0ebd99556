"""Prompts to text: whole answers of many prompts, or one answer bit by bit."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from tinsmith.core.rng import derive_seed
from tinsmith.infer.engine import Engine, Event
from tinsmith.infer.sample import SamplingParams
from tinsmith.nn.model import LM
from tinsmith.text.stream import StopStrings, TextStream
from tinsmith.text.tokenizer import Tokenizer


class Completion(NamedTuple):
    """One completion of a prompt."""

    token_ids: list[int]
    """All that was drawn: the stop token, or what a stop string cut off, included."""
    text: str
    """Without the stop token, up to a stop string."""
    finish_reason: str
    """`stop`, `length`, or `cancelled`."""
    logprobs: list[float]
    """Of the ids, as `Event.logprob` says."""


class CompletionBuilder:
    """The tokens of one request as text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._stream = TextStream(tokenizer)
        self._stops = StopStrings(stop)
        self._events: list[Event] = []
        self._text: list[str] = []
        self.finish_reason: str | None = None

    def push(self, event: Event) -> str:
        """The text that is certain with this token; never part of a character or a stop string.

        With the last of it, `finish` is set; a request that goes on then is to be dropped.
        """
        self._events.append(event)
        new = "" if event.finish_reason == "stop" else self._stream.push(event.token)
        if event.finish_reason is not None:
            new += self._stream.finish()
        new, stopped = self._stops.push(new)
        if stopped:
            self.finish_reason = "stop"
        elif event.finish_reason is not None:
            new += self._stops.finish()
            self.finish_reason = event.finish_reason
        self._text.append(new)
        return new

    def completion(self) -> Completion:
        """All of it; `cancelled` where it is not at its end."""
        ids = [event.token for event in self._events]
        logprobs = [event.logprob for event in self._events]
        return Completion(ids, "".join(self._text), self.finish_reason or "cancelled", logprobs)


def generate(
    lm: LM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    sampling_params: SamplingParams | Sequence[SamplingParams],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    should_stop: Callable[[], bool] | None = None,
) -> list[Completion]:
    """An answer to every prompt, `rows` at a time; one sampling for all, or one each.

    An answer depends on its prompt and its seed, not on what else is asked, so a prompt that is
    repeated wants samplings of its own: see `spread`. Equal prompts in a row are taken in once.
    `poll` is asked between steps; where it says True, answers end as they are.
    """
    each = (
        [sampling_params] * len(prompts)
        if isinstance(sampling_params, SamplingParams)
        else sampling_params
    )
    with eval_mode(lm):
        engine = Engine(lm, max_batch_size=batch_size, eos_ids=eos_ids(tokenizer))
        answers: dict[int, CompletionBuilder] = {}
        for prompt, settings in zip(prompts, each, strict=True):
            answers[engine.add(prompt, settings, max_new_tokens)] = CompletionBuilder(
                tokenizer, stop
            )
        while (engine.num_active or engine.num_waiting) and not (should_stop and should_stop()):
            for event in engine.step():
                answers[event.request_id].push(event)
                if answers[event.request_id].finish_reason is not None:
                    engine.cancel(event.request_id)
    return [answer.completion() for answer in answers.values()]


def stream(
    lm: LM,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    sampling_params: SamplingParams,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> Generator[str, None, None]:
    """The text of one answer in increments, none of them empty; closing it ends the work."""
    with eval_mode(lm):
        engine = Engine(lm, max_batch_size=1, eos_ids=eos_ids(tokenizer))
        number = engine.add(prompt, sampling_params, max_new_tokens)
        yield from stream_request(engine, number, CompletionBuilder(tokenizer, stop))


def stream_request(
    engine: Engine, request_id: int, builder: CompletionBuilder
) -> Generator[str, None, None]:
    """Run the engine for the sake of one request, the text of which comes in increments; closing
    this drops the request.
    """
    try:
        while builder.finish_reason is None:
            for event in engine.step():
                if event.request_id == request_id and builder.finish_reason is None:
                    new = builder.push(event)
                    if new:
                        yield new
    finally:
        engine.cancel(request_id)


def with_distinct_seeds(sampling_params: SamplingParams, count: int) -> list[SamplingParams]:
    """For `count` answers to one prompt: the first keeps the seed, the others get their own."""
    if sampling_params.seed is None:
        return [sampling_params] * count
    seeds = [
        sampling_params.seed,
        *(derive_seed(sampling_params.seed, "answer", i) for i in range(1, count)),
    ]
    return [replace(sampling_params, seed=seed) for seed in seeds[:count]]


def eos_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids that end an answer."""
    return tokenizer.end_of_text, tokenizer.end_of_turn


@contextmanager
def eval_mode(lm: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode again afterwards."""
    modes = [(module, module.training) for module in lm.modules()]
    lm.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

"""Prompts to text: whole answers of many prompts, or one answer bit by bit."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from tinsmith.core.rng import derive
from tinsmith.infer.engine import Engine, Event
from tinsmith.infer.sample import Sampling
from tinsmith.infer.stop import StopStrings
from tinsmith.nn.model import LM
from tinsmith.text.stream import TextStream
from tinsmith.text.tokenizer import Tokenizer


class Completion(NamedTuple):
    """An answer."""

    ids: list[int]
    """All that was drawn: the stop token, or what a stop string cut off, included."""
    text: str
    """Without the stop token, up to a stop string."""
    finish: str
    """`stop`, `length`, or `cancelled`."""
    logprobs: list[float]
    """Of the ids, as `Event.logprob` says."""


class Answer:
    """The tokens of one request as text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._stream = TextStream(tokenizer)
        self._stops = StopStrings(stop)
        self._events: list[Event] = []
        self._text: list[str] = []
        self.finish: str | None = None

    def take(self, event: Event) -> str:
        """The text that is certain with this token; never part of a character or a stop string.

        With the last of it, `finish` is set; a request that goes on then is to be dropped.
        """
        self._events.append(event)
        new = "" if event.finish == "stop" else self._stream.push(event.token)
        if event.finish is not None:
            new += self._stream.finish()
        new, stopped = self._stops.push(new)
        if stopped:
            self.finish = "stop"
        elif event.finish is not None:
            new += self._stops.finish()
            self.finish = event.finish
        self._text.append(new)
        return new

    def completion(self) -> Completion:
        """All of it; `cancelled` where it is not at its end."""
        ids = [event.token for event in self._events]
        logprobs = [event.logprob for event in self._events]
        return Completion(ids, "".join(self._text), self.finish or "cancelled", logprobs)


def generate(
    lm: LM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling | Sequence[Sampling],
    max_new: int,
    stop: Sequence[str] = (),
    rows: int = 8,
    poll: Callable[[], bool] | None = None,
) -> list[Completion]:
    """An answer to every prompt, `rows` at a time; one sampling for all, or one each.

    An answer depends on its prompt and its seed, not on what else is asked, so a prompt that is
    repeated wants samplings of its own: see `spread`. Equal prompts in a row are taken in once.
    `poll` is asked between steps; where it says True, answers end as they are.
    """
    each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    with evaluating(lm):
        engine = Engine(lm, rows=rows, eos=ends(tokenizer))
        answers: dict[int, Answer] = {}
        for prompt, settings in zip(prompts, each, strict=True):
            answers[engine.add(prompt, settings, max_new)] = Answer(tokenizer, stop)
        while (engine.active or engine.waiting) and not (poll and poll()):
            for event in engine.step():
                answers[event.number].take(event)
                if answers[event.number].finish is not None:
                    engine.drop(event.number)
    return [answer.completion() for answer in answers.values()]


def stream(
    lm: LM,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    sampling: Sampling,
    max_new: int,
    stop: Sequence[str] = (),
) -> Generator[str, None, None]:
    """The text of one answer in increments, none of them empty; closing it ends the work."""
    with evaluating(lm):
        engine = Engine(lm, rows=1, eos=ends(tokenizer))
        number = engine.add(prompt, sampling, max_new)
        yield from follow(engine, number, Answer(tokenizer, stop))


def follow(engine: Engine, number: int, answer: Answer) -> Generator[str, None, None]:
    """Run the engine for the sake of one request, the text of which comes in increments; closing
    this drops the request.
    """
    try:
        while answer.finish is None:
            for event in engine.step():
                if event.number == number and answer.finish is None:
                    new = answer.take(event)
                    if new:
                        yield new
    finally:
        engine.drop(number)


def spread(sampling: Sampling, count: int) -> list[Sampling]:
    """For `count` answers to one prompt: the first keeps the seed, the others get their own."""
    if sampling.seed is None:
        return [sampling] * count
    seeds = [sampling.seed, *(derive(sampling.seed, "answer", i) for i in range(1, count))]
    return [replace(sampling, seed=seed) for seed in seeds[:count]]


def ends(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids that end an answer."""
    return tokenizer.end_of_text, tokenizer.end_of_turn


@contextmanager
def evaluating(lm: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode again afterwards."""
    modes = [(module, module.training) for module in lm.modules()]
    lm.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

"""Generate text offline: completions of many prompts, or one completion as a stream."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from tinsmith.core.rng import derive_seed
from tinsmith.infer.completions import Completion, CompletionEngine, raise_on_error
from tinsmith.infer.sample import SamplingParams
from tinsmith.nn.model import LM
from tinsmith.text.tokenizer import Tokenizer


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
    """Complete every prompt, `batch_size` at a time, with one `sampling_params` for all or one per
    prompt.

    A completion depends on its prompt and seed, not on the other prompts; completions of a repeated
    prompt need seeds of their own (`with_distinct_seeds`). `should_stop` is called before every
    step; when it returns True, unfinished completions are returned as they are, with
    `finish_reason` `cancelled`. Raise Failure if the model's logits are NaN or infinite.
    """
    per_prompt = (
        [sampling_params] * len(prompts)
        if isinstance(sampling_params, SamplingParams)
        else sampling_params
    )
    with eval_mode(lm):
        engine = CompletionEngine(lm, tokenizer, max_batch_size=batch_size)
        streams = [
            engine.add(prompt, params, max_new_tokens, stop)
            for prompt, params in zip(prompts, per_prompt, strict=True)
        ]
        while engine.busy and not (should_stop and should_stop()):
            engine.step()
    completions = [stream.completion() for stream in streams]
    for completion in completions:
        raise_on_error(completion)
    return completions


def stream(
    lm: LM,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    sampling_params: SamplingParams,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> Generator[str, None, None]:
    """Yield the text of one completion in increments that are not empty. Closing the generator ends
    the request.
    """
    with eval_mode(lm):
        engine = CompletionEngine(lm, tokenizer, max_batch_size=1)
        yield from engine.add(prompt, sampling_params, max_new_tokens, stop).text()


def with_distinct_seeds(sampling_params: SamplingParams, count: int) -> list[SamplingParams]:
    """Return parameters for `count` completions of one prompt: the first keeps the seed, the others
    have seeds derived from it. Without a seed every completion differs anyway.
    """
    if sampling_params.seed is None:
        return [sampling_params] * count
    seeds = [
        sampling_params.seed,
        *(derive_seed(sampling_params.seed, "answer", i) for i in range(1, count)),
    ]
    return [replace(sampling_params, seed=seed) for seed in seeds[:count]]


@contextmanager
def eval_mode(lm: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and restore the mode of every module afterwards."""
    modes = [(module, module.training) for module in lm.modules()]
    lm.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

"""`tinsmith generate`: complete prompts."""

import json
import sys
from itertools import chain
from typing import NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.core.log import print_line
from tinsmith.hub.load import load
from tinsmith.infer.completions import Completion
from tinsmith.infer.generate import generate as complete
from tinsmith.infer.generate import stream, with_distinct_seeds
from tinsmith.infer.sample import SamplingParams
from tinsmith.nn.model import LM
from tinsmith.text.chat import encode_prompt
from tinsmith.text.records import parse_conversation
from tinsmith.text.tokenizer import Tokenizer
from tinsmith.train.parallel import pick_device
from tinsmith.verbs.export_import import parse_rope_scaling


class GenerateOptions(NamedTuple):
    """Options of `tinsmith generate`."""

    count: int
    """Number of completions per prompt."""
    chat: bool
    """If True, every prompt is a user message in the chat template."""
    max_new_tokens: int
    sampling_params: SamplingParams
    stop: tuple[str, ...]


def sampling_params(**settings: float | None) -> SamplingParams:
    """Create sampling parameters from command-line flags. Raise UserError, which names the flag,
    if a value is out of range.
    """
    try:
        return SamplingParams(**settings)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from None


def generate(
    model: str,
    prompts: list[str],
    options: GenerateOptions,
    rope_scaling: str | None,
    as_json: bool,
) -> None:
    """Print all completions. If there is only one, it is printed while it is generated."""
    if options.count < 1 or options.max_new_tokens < 1:
        raise UserError("--count and --max-new-tokens: at least 1")
    texts = prompts or [_read_stdin()]
    lm, tokenizer = load(
        model, device=pick_device("auto"), rope_scaling=parse_rope_scaling(rope_scaling)
    )
    if tokenizer is None:
        raise UserError(f"{model}: has no tokenizer, so it cannot read a prompt")
    encoded = [prompt_ids(tokenizer, text, options.chat) for text in texts]
    if len(encoded) == 1 and options.count == 1 and not as_json:
        _print_stream(lm, tokenizer, texts[0], encoded[0], options)
        return
    repeated = [ids for ids in encoded for _ in range(options.count)]
    completions = complete(
        lm,
        tokenizer,
        repeated,
        sampling_params=with_distinct_seeds(options.sampling_params, len(repeated)),
        max_new_tokens=options.max_new_tokens,
        stop=options.stop,
    )
    _print_all(
        [text for text in texts for _ in range(options.count)], completions, options.chat, as_json
    )


def prompt_ids(tokenizer: Tokenizer, text: str, chat: bool) -> list[int]:
    """Encode a prompt, with the tokenizer's prefix (BOS). An empty text becomes the end-of-text
    token, which precedes a document.
    """
    if chat:
        record = {"messages": [{"role": "user", "content": text}]}
        return encode_prompt(tokenizer, parse_conversation(record, answered=False))
    return tokenizer.prefix + tokenizer.encode(text) or [tokenizer.end_of_text]


def _read_stdin() -> str:
    if sys.stdin.isatty():
        raise UserError("no prompt: give one with -p, or on standard input")
    return sys.stdin.read()


def _print_stream(
    lm: LM, tokenizer: Tokenizer, text: str, ids: list[int], options: GenerateOptions
) -> None:
    increments = stream(
        lm,
        tokenizer,
        ids,
        sampling_params=options.sampling_params,
        max_new_tokens=options.max_new_tokens,
        stop=options.stop,
    )
    first = next(increments, "")  # a prompt that is too long raises here, before it is printed
    for increment in chain([first if options.chat else text + first], increments):
        sys.stdout.write(increment)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _print_all(texts: list[str], completions: list[Completion], chat: bool, as_json: bool) -> None:
    for text, completion in zip(texts, completions, strict=True):
        if as_json:
            record = {
                "prompt": text,
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "completion_tokens": len(completion.token_ids),
            }
            print_line(json.dumps(record, ensure_ascii=False))
        else:
            print_line((completion.text if chat else text + completion.text) + "\n")

"""`tinsmith generate`: a text continued."""

import json
import sys
from itertools import chain
from typing import NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.core.log import print_line
from tinsmith.hub.load import load
from tinsmith.infer.generate import Completion, stream
from tinsmith.infer.generate import generate as complete
from tinsmith.infer.sample import SamplingParams
from tinsmith.nn.model import LM
from tinsmith.text.chat import encode_prompt
from tinsmith.text.records import parse_conversation
from tinsmith.text.tokenizer import Tokenizer
from tinsmith.train.parallel import pick_device
from tinsmith.verbs.export_import import parse_rope_scaling


class Request(NamedTuple):
    """What is asked of the model."""

    count: int
    chat: bool
    max_new_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...]


def sampling(**settings: float | None) -> SamplingParams:
    """Flags as the sampler takes them; UserError names a value that cannot be."""
    try:
        return SamplingParams(**settings)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from None


def generate(
    model: str, prompts: list[str], request: Request, rope_scaling: str | None, as_json: bool
) -> None:
    """Print every continuation; a single one is printed as it is made."""
    if request.count < 1 or request.max_new_tokens < 1:
        raise UserError("--count and --max-new-tokens: at least 1")
    texts = prompts or [_standard_input()]
    lm, tokenizer = load(
        model, device=pick_device("auto"), rope_scaling=parse_rope_scaling(rope_scaling)
    )
    if tokenizer is None:
        raise UserError(f"{model}: has no tokenizer, so it cannot read a prompt")
    encoded = [prompt_ids(tokenizer, text, request.chat) for text in texts]
    if len(encoded) == 1 and request.count == 1 and not as_json:
        _show(lm, tokenizer, texts[0], encoded[0], request)
        return
    repeated = [ids for ids in encoded for _ in range(request.count)]
    done = complete(
        lm,
        tokenizer,
        repeated,
        sampling_params=request.sampling,
        max_new_tokens=request.max_new_tokens,
        stop=request.stop,
    )
    _print_all([text for text in texts for _ in range(request.count)], done, request.chat, as_json)


def prompt_ids(tokenizer: Tokenizer, text: str, chat: bool) -> list[int]:
    """A prompt's ids; nothing at all begins where documents begin."""
    if chat:
        record = {"messages": [{"role": "user", "content": text}]}
        return encode_prompt(tokenizer, parse_conversation(record, answered=False))
    return tokenizer.encode(text) or [tokenizer.end_of_text]


def _standard_input() -> str:
    if sys.stdin.isatty():
        raise UserError("no prompt: give one with -p, or on standard input")
    return sys.stdin.read()


def _show(lm: LM, tokenizer: Tokenizer, text: str, ids: list[int], request: Request) -> None:
    pieces = stream(
        lm,
        tokenizer,
        ids,
        sampling_params=request.sampling,
        max_new_tokens=request.max_new_tokens,
        stop=request.stop,
    )
    first = next(pieces, "")  # a prompt that does not fit is refused here, before it is printed
    for piece in chain([first if request.chat else text + first], pieces):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _print_all(texts: list[str], done: list[Completion], chat: bool, as_json: bool) -> None:
    for text, each in zip(texts, done, strict=True):
        if as_json:
            row = {
                "prompt": text,
                "text": each.text,
                "finish_reason": each.finish_reason,
                "completion_tokens": len(each.token_ids),
            }
            print_line(json.dumps(row, ensure_ascii=False))
        else:
            print_line((each.text if chat else text + each.text) + "\n")

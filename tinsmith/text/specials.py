"""Special tokens of Tinsmith's tokenizers, and its chat template."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PAD = "<|pad|>"
"""Padding token, in a vocabulary that has it. Otherwise the end-of-text token pads rows."""
TAGS = (
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
"""Tags inside a turn: single ids that `skip_special_tokens` leaves in the text."""

CHAT_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN, *TAGS)
"""Tokens that are added to a tokenizer without them."""
SPECIALS: tuple[str, ...] = (*CHAT_TOKENS, *(f"<|reserved_{number}|>" for number in range(5)))
"""First ids of every tokenizer that Tinsmith trains, from 0 on."""

_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def as_added(names: Iterable[str]) -> list[AddedToken]:
    """Make added tokens of these names: special except for the tags, and never normalized."""
    return [AddedToken(name, special=name not in TAGS, normalized=False) for name in names]


def our_template() -> str:
    """Return Tinsmith's chat template: ChatML with tools and reasoning, as Jinja."""
    return _TEMPLATE.read_text(encoding="utf-8")

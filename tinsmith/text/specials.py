"""The special tokens of every tokenizer here, and the chat template that is written in them."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PAD = "<|pad|>"
"""Fills rows, in a vocabulary that has it; else the end of a text does."""
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
"""Marks inside a turn: single ids that `skip_special_tokens` leaves in the text."""

CHAT_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN, *TAGS)
"""What is added to a tokenizer that lacks it."""
SPECIALS: tuple[str, ...] = (*CHAT_TOKENS, *(f"<|reserved_{number}|>" for number in range(5)))
"""The first ids of every tokenizer that is trained here, from 0 on."""

_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def as_added(names: Iterable[str]) -> list[AddedToken]:
    """The names as added tokens: special, but for the tags, and never subject to a normaliser."""
    return [AddedToken(name, special=name not in TAGS, normalized=False) for name in names]


def our_template() -> str:
    """Tinsmith's chat template, ChatML with tools and reasoning, as Jinja."""
    return _TEMPLATE.read_text(encoding="utf-8")

"""Conversations as text and as ids, with the mask of what the assistant says.

What a message says is text, whatever it says: a name such as `<|im_end|>` inside it is spelled out in ordinary tokens.
One exception: an assistant's own words may hold marks such as `<think>` or `<answer>`, and there these are single ids,
because whoever wrote the record wrote what the model is to say. In every other role nothing is.

How it is done: every character that could begin a special token's name is followed, inside messages, by a guard, a
character that occurs nowhere in the conversation. The template is rendered, names without a guard become ids, and the
guards are taken out of the rest. This works for any template, those of downloaded tokenizers included.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.text.records import BadRecord, Call, Conversation, Message, normalise
from tinsmith.text.template import Refused, compiled
from tinsmith.text.tokenizer import END_OF_TEXT, TAGS, TEMPLATE, Tokenizer

__all__ = [
    "BadRecord",
    "Call",
    "Conversation",
    "Encoded",
    "Message",
    "encode_chat",
    "encode_prompt",
    "normalise",
    "render",
]

Change = Callable[[str, str], str]
"""(role, text) -> text."""

_OPENING = re.compile(r"<think>\n(?:\n</think>\n\n)?")
_NONCHARACTERS = "".join(map(chr, range(0xFDD0, 0xFDF0)))


class Encoded(NamedTuple):
    """Ids, and for each whether the assistant says it (its end of turn included)."""

    ids: list[int]
    mask: list[bool]


def render(conversation: Conversation, generate: bool = False, thinking: bool | None = None) -> str:
    """A conversation in Tinsmith's ChatML; `generate` opens the assistant's turn, `thinking` its `<think>` too."""
    messages, tools = _plain(conversation, lambda role, text: text)
    return _rendered(None, messages, tools, generate, thinking)


def encode_chat(tokenizer: Tokenizer, conversation: Conversation) -> Encoded:
    """Ids of a whole conversation with the loss mask, by the tokenizer's own template or else Tinsmith's.

    The mask covers reasoning, content, calls and the end-of-turn token of every assistant turn, not the header before
    and not the line end after it. UserError where a template does not show where turns begin and end; BadRecord where
    it refuses the conversation.
    """
    return _encoded(tokenizer, conversation, False, None)


def encode_prompt(
    tokenizer: Tokenizer, conversation: Conversation, thinking: bool | None = None
) -> list[int]:
    """Ids up to and with the header of the answer: a prefix of `encode_chat` of the conversation with the answer."""
    if conversation.messages and conversation.messages[-1].role == "assistant":
        raise UserError("a prompt ends with what a user or a tool says, not with the assistant")
    return _encoded(tokenizer, conversation, True, thinking).ids


def _encoded(
    tokenizer: Tokenizer, conversation: Conversation, generate: bool, thinking: bool | None
) -> Encoded:
    """Encode stretch by stretch, cut where turns of the assistant begin and end."""
    guards = _Guards(tokenizer, conversation)
    messages, tools = _plain(conversation, guards.protect)
    text = _rendered(tokenizer, messages, tools, generate, thinking)
    ids: list[int] = []
    mask: list[bool] = []
    place = 0
    for start, opened, end in [
        *_turns(tokenizer, text, messages, tools, guards.mark),
        (len(text),) * 3,
    ]:
        for stop, said in ((start, False), (opened, True), (end, True)):
            new = guards.encode(text[place:stop])
            ids += new
            mask += [said] * len(new)
            place = stop
    return Encoded(ids, mask)


def _turns(
    tokenizer: Tokenizer, text: str, messages: list[dict[str, Any]], tools: list[Any], mark: str
) -> Iterator[tuple[int, int, int]]:
    """Where the assistant's turns lie in a rendered text: start, end of what opens its reasoning, end.

    A turn starts where the prompt for it ends, and ends with the first end-of-turn token from there.
    """
    closing = tokenizer.decode([tokenizer.end_of_turn])
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        header = _rendered(tokenizer, messages[:place], tools, True, None)
        if not text.startswith(header):
            raise UserError(
                "the chat template writes a prompt differently once it is answered; it gives no loss mask"
            )
        start = len(header)
        found = text.find(closing, start)
        if found < 0 or mark in text[start:found]:
            raise UserError(
                f"the chat template does not end the assistant's turn with {closing}; it gives no loss mask"
            )
        opening = _OPENING.match(text, start)
        yield start, opening.end() if opening else start, found + len(closing)


class _Guards:
    """Two characters that a conversation does not have: one keeps names in messages from being tokens, one marks
    where somebody else than the assistant begins to speak.
    """

    def __init__(self, tokenizer: Tokenizer, conversation: Conversation):
        self._tokenizer = tokenizer
        self._names, self._first, self._first_or_tag = _patterns(tuple(tokenizer.added_tokens))
        said: list[str] = []
        _plain(conversation, lambda role, text: said.append(text) or text)
        whole = "".join(said)
        free = [character for character in _NONCHARACTERS if character not in whole]
        if len(free) < 2:
            raise BadRecord("uses nearly all of Unicode's noncharacters")
        self._guard, self.mark = free[:2]

    def protect(self, role: str, text: str) -> str:
        """Put a guard behind each character that could begin a token's name, but for an assistant's tags."""
        pattern = self._first_or_tag if role == "assistant" else self._first
        guarded = pattern.sub(
            lambda match: match[0] + self._guard if len(match[0]) == 1 else match[0], text
        )
        return self.mark + guarded if role in ("user", "tool") else guarded

    def encode(self, text: str) -> list[int]:
        """Names without a guard as their ids, all else as text."""
        ids: list[int] = []
        for place, piece in enumerate(self._names.split(text)):
            if place % 2:
                ids.append(self._tokenizer.special(piece))
            elif piece:
                ids += self._tokenizer.encode_inside(
                    piece.replace(self._guard, "").replace(self.mark, "")
                )
        return ids


@lru_cache(maxsize=16)
def _patterns(names: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """For a vocabulary's added tokens: any name; any character that begins one; such a character, or a whole tag.

    Some vocabularies have runs of blanks, or single characters, as added tokens: these are text to us.
    """
    real = sorted((name for name in names if len(name.strip(" \n\t▁")) > 1), key=len, reverse=True)
    first = "[" + re.escape("".join(sorted({name[0] for name in real}))) + "]"
    tags = "|".join(re.escape(name) for name in TAGS)
    return (
        re.compile("(" + "|".join(map(re.escape, real)) + ")"),
        re.compile(first),
        re.compile(f"{tags}|{first}"),
    )


def _plain(conversation: Conversation, change: Change) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages and tools as chat templates want them, every text in them changed."""
    messages = []
    for message in conversation.messages:
        plain: dict[str, Any] = {
            "role": message.role,
            "content": change(message.role, message.content),
        }
        if message.reasoning:
            plain["reasoning_content"] = change(message.role, message.reasoning)
        if message.calls:
            plain["tool_calls"] = [_plain_call(call, change) for call in message.calls]
        messages.append(plain)
    return messages, _changed(list(conversation.tools), "tools", change)


def _plain_call(call: Call, change: Change) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"type": "function", "function": _changed(function, "assistant", change)}


def _changed(value: Any, role: str, change: Change) -> Any:
    if isinstance(value, str):
        return change(role, value)
    if isinstance(value, list):
        return [_changed(item, role, change) for item in value]
    if isinstance(value, dict):
        return {change(role, key): _changed(item, role, change) for key, item in value.items()}
    return value


def _rendered(
    tokenizer: Tokenizer | None,
    messages: list[Any],
    tools: list[Any],
    generate: bool,
    thinking: bool | None,
) -> str:
    """The text of messages, by the tokenizer's own template where it has one."""
    own = tokenizer.chat_template if tokenizer else None
    variables: dict[str, Any] = {
        "messages": messages,
        "tools": tools or None,
        "add_generation_prompt": generate,
        "bos_token": (tokenizer.bos or "") if tokenizer else END_OF_TEXT,
        "eos_token": tokenizer.eos if tokenizer else END_OF_TEXT,
    }
    if thinking is not None:
        variables["enable_thinking"] = thinking
    room = 1_000_000 + 8 * len(json.dumps([messages, tools], ensure_ascii=False))
    try:
        return compiled(_our_template() if own is None else own).render(variables, room)
    except Refused as error:
        raise BadRecord(f"the chat template refuses it: {error}") from None


@lru_cache(maxsize=1)
def _our_template() -> str:
    return TEMPLATE.read_text(encoding="utf-8")

"""Encode conversations with a chat template, with the loss mask of the assistant's tokens.

The content of a message is always text: a name such as `<|im_end|>` in it is encoded with ordinary
tokens. There is one exception. In an assistant message, tags such as `<think>` or `<answer>` become
single ids, because the record contains what the model should generate.

Method: inside messages, every character that could begin the name of a special token is followed by
a guard, a character that occurs nowhere in the conversation. The template is rendered, names
without a guard become ids, and the guards are removed from the rest. This works for any template,
including those of downloaded tokenizers.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.text.fields import BadRecord
from tinsmith.text.records import Call, Conversation, Message, parse_conversation
from tinsmith.text.specials import END_OF_TEXT, SPECIALS, TAGS, our_template
from tinsmith.text.template import ChatTemplate, TemplateRefused, compile_template
from tinsmith.text.tokenizer import Tokenizer

__all__ = [
    "BadRecord",
    "Call",
    "Conversation",
    "EncodedChat",
    "Message",
    "encode_chat",
    "encode_prompt",
    "parse_conversation",
    "render",
    "template_texts",
]

_REASONING_OPENING = re.compile(r"<think>\n(?:\n</think>\n\n)?")
"""Text that a prompt may add after the assistant header: an open or an empty reasoning block."""
_NAMES = re.compile("|".join(map(re.escape, SPECIALS)))
_NONCHARACTERS = "".join(map(chr, range(0xFDD0, 0xFDF0)))
_TextChange = Callable[[str, str], str]


class EncodedChat(NamedTuple):
    """Token ids and the loss mask: True on tokens of the assistant, end-of-turn token included."""

    ids: list[int]
    mask: list[bool]


def render(conversation: Conversation, generate: bool = False, thinking: bool | None = None) -> str:
    """Render a conversation in Tinsmith's ChatML.

    `generate` adds the header of the assistant's next turn; `thinking` also opens `<think>`.
    """
    return _template_input(None, conversation, lambda role, text: text).text(generate, thinking)


def template_texts(conversation: Conversation) -> list[str]:
    """Return the text of a conversation in Tinsmith's ChatML, split at special tokens.

    A tokenizer is trained on these texts, so that it also learns the words of the template.
    """
    return [piece for piece in _NAMES.split(render(conversation)) if piece]


def encode_chat(tokenizer: Tokenizer, conversation: Conversation) -> EncodedChat:
    """Encode a conversation with its loss mask, by the tokenizer's own template or Tinsmith's.

    The mask covers reasoning, content, calls and the end-of-turn token of every assistant turn, but
    not the header before it and not the line end after it. Raise UserError if the template does not
    show where turns begin and end, and BadRecord if it refuses the conversation.
    """
    return _encode(tokenizer, conversation, generate=False, thinking=None)


def encode_prompt(
    tokenizer: Tokenizer, conversation: Conversation, thinking: bool | None = None
) -> list[int]:
    """Encode a prompt up to the header of the answer. It is a prefix of `encode_chat` of the
    answered conversation.
    """
    if conversation.messages and conversation.messages[-1].role == "assistant":
        raise UserError(
            "a prompt must end with a message of a user or a tool, not of the assistant"
        )
    return _encode(tokenizer, conversation, generate=True, thinking=thinking).ids


def _encode(
    tokenizer: Tokenizer, conversation: Conversation, *, generate: bool, thinking: bool | None
) -> EncodedChat:
    """Encode piece by piece, split where assistant turns begin and end."""
    if tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer has no chat template; fine-tune the model on chats first, or give the "
            "tokenizer a chat_template.jinja"
        )
    guards = _Guards(tokenizer, conversation)
    script = _template_input(tokenizer, conversation, guards.protect)
    text = script.text(generate, thinking)
    _check_complete(conversation, guards, text)
    ids: list[int] = []
    mask: list[bool] = []
    position = 0
    for start, opening_end, end in [
        *_turns(tokenizer, script, text, guards.mark),
        (len(text),) * 3,
    ]:
        for stop, is_target in ((start, False), (opening_end, True), (end, True)):
            new = guards.encode(text[position:stop])
            ids += new
            mask += [is_target] * len(new)
            position = stop
    return EncodedChat(ids, mask)


def _check_complete(conversation: Conversation, guards: "_Guards", text: str) -> None:
    """Raise BadRecord if the rendered text leaves out a message, a tool, a call, or the reasoning
    of the last assistant message. Templates leave out earlier reasoning by design, and may show a
    text as JSON.
    """

    def shown(role: str, part: str) -> str | None:
        """Return the form in which the text contains a part of the conversation."""
        protected = guards.protect(role, part).strip()
        forms = (protected, json.dumps(protected, ensure_ascii=False)[1:-1])
        return next((form for form in forms if form in text), None)

    names = text  # without contents that begin with the mark, which may contain names of tools
    for index, message in enumerate(conversation.messages, 1):
        after_reasoning = message.content.rpartition("</think>")[2]
        form = shown(message.role, message.content) or shown(message.role, after_reasoning)
        if form is None:
            raise BadRecord(f"the chat template leaves out message {index} ({message.role})")
        names = names.replace(form, "", 1) if form.startswith(guards.mark) else names
    for tool in conversation.tools:
        name = tool.get("function", tool).get("name")
        if isinstance(name, str) and guards.protect("tools", name) not in names:
            raise BadRecord(f"the chat template leaves out the description of the tool {name}")
    for index, message in enumerate(conversation.messages, 1):
        for call in message.calls:
            if guards.protect(message.role, call.name) not in names:
                raise BadRecord(f"the chat template leaves out the call in message {index}")
    last = conversation.messages[-1]
    if last.reasoning and shown(last.role, last.reasoning) is None:
        raise BadRecord(
            f"the chat template leaves out the reasoning of message {len(conversation.messages)}"
        )


def _turns(
    tokenizer: Tokenizer, script: "_TemplateInput", text: str, mark: str
) -> Iterator[tuple[int, int, int]]:
    """Find the assistant's turns with a loss in a rendered text: start, end of the opening text,
    end.

    A turn starts where its prompt ends, and ends with the first end-of-turn token after that.
    """
    closing = tokenizer.decode([tokenizer.end_of_turn])
    for index in script.trained:
        header = script.text(True, None, until=index)
        if not text.startswith(header):
            raise UserError(
                "the chat template renders an answered prompt differently, so there is no mask"
            )
        start = len(header)
        closing_start = text.find(closing, start)
        if closing_start < 0 or mark in text[start:closing_start]:
            raise UserError(
                f"the chat template ends a turn without {closing}, so there is no loss mask"
            )
        opening = _REASONING_OPENING.match(text, start)
        yield start, opening.end() if opening else start, closing_start + len(closing)


class _Guards:
    """Two characters that do not occur in the conversation.

    The guard prevents names inside messages from becoming special tokens. The mark stands where a
    turn of another role begins.
    """

    def __init__(self, tokenizer: Tokenizer, conversation: Conversation):
        self._tokenizer = tokenizer
        self._patterns = _patterns(tuple(tokenizer.added_tokens))
        texts: list[str] = []
        _template_input(tokenizer, conversation, lambda role, text: texts.append(text) or text)
        free = [c for c in _NONCHARACTERS if not any(c in text for text in texts)]
        if len(free) < 2:
            raise BadRecord("the conversation uses nearly all of Unicode's noncharacters")
        self._guard, self.mark = free[:2]
        self._preceding: str | None = ""
        """Special token directly before the next piece, empty at the start of the text."""

    def protect(self, role: str, text: str) -> str:
        """Insert a guard after characters that could begin a name, except in assistant tags."""
        begins = self._patterns.begins_or_tag if role == "assistant" else self._patterns.begins
        guarded = begins.sub(self._guarded, text)
        return self.mark + guarded if role in ("user", "tool") else guarded

    def encode(self, text: str) -> list[int]:
        """Encode the next piece of a rendered text. Names without a guard become special ids."""
        tokenizer = self._tokenizer
        ids: list[int] = []
        pieces = [*self._patterns.names.split(text), None]
        for index, (piece, following) in enumerate(pairwise(pieces)):
            if index % 2:
                ids.append(tokenizer.special(piece))
                self._preceding = piece
                continue
            bare = piece.replace(self._guard, "").replace(self.mark, "")
            bare = bare.lstrip() if self._preceding in tokenizer.strips_right else bare
            bare = bare.rstrip() if following in tokenizer.strips_left else bare
            if bare:
                ids += self._encode_text(bare)
                self._preceding = None
        return ids

    def _encode_text(self, text: str) -> list[int]:
        if self._preceding is None:
            return self._tokenizer.encode_inside(text)
        if self._preceding:
            return self._tokenizer.encode_after_special(text)
        return self._tokenizer.encode(text)

    def _guarded(self, match: re.Match[str]) -> str:
        return match[0] + self._guard if len(match[0]) == 1 else match[0]


class _Patterns(NamedTuple):
    """Patterns for added tokens: a whole name, the first character of one, that or a whole tag."""

    names: re.Pattern[str]
    begins: re.Pattern[str]
    begins_or_tag: re.Pattern[str]


@lru_cache(maxsize=16)
def _patterns(names: tuple[str, ...]) -> _Patterns:
    """Compile the patterns. Names of one character are left out: a guard cannot split them."""
    splittable = sorted((name for name in names if len(name.strip()) > 1), key=len, reverse=True)
    begins = "[" + re.escape("".join(sorted({name[0] for name in splittable}))) + "]"
    tags = "|".join(map(re.escape, TAGS))
    return _Patterns(
        re.compile("(" + "|".join(map(re.escape, splittable)) + ")"),
        re.compile(begins),
        re.compile(f"{tags}|{begins}"),
    )


@dataclass(frozen=True)
class _TemplateInput:
    """A conversation as plain data for a chat template, and the template."""

    template: ChatTemplate
    messages: list[dict[str, Any]]
    trained: list[int]
    """Indices of the assistant's messages that have a loss."""
    tools: list[dict[str, Any]]
    bos: str
    eos: str
    room: int

    def text(self, generate: bool, thinking: bool | None, until: int | None = None) -> str:
        """Render the messages, or those before `until`."""
        variables: dict[str, Any] = {
            "messages": self.messages[:until],
            "tools": self.tools or None,
            "add_generation_prompt": generate,
            "bos_token": self.bos,
            "eos_token": self.eos,
        }
        if thinking is not None:
            variables |= {"enable_thinking": thinking, "open_thinking": thinking}
        try:
            return self.template.render(variables, self.room)
        except TemplateRefused as error:
            raise BadRecord(f"the chat template refuses this conversation: {error}") from None


def _template_input(
    tokenizer: Tokenizer | None, conversation: Conversation, change: _TextChange
) -> _TemplateInput:
    """Prepare a conversation for its template, with `change` applied to every text. Tool
    descriptions have the role `tools`.
    """
    return _TemplateInput(
        template=compile_template((tokenizer and tokenizer.chat_template) or our_template()),
        messages=[_message_dict(message, change) for message in conversation.messages],
        trained=[
            index
            for index, message in enumerate(conversation.messages)
            if message.role == "assistant" and message.trained
        ],
        tools=[_map_texts(tool, "tools", change) for tool in conversation.tools],
        bos=(tokenizer.bos or "") if tokenizer else END_OF_TEXT,
        eos=tokenizer.eos if tokenizer else END_OF_TEXT,
        room=1_000_000 + 16 * len(repr(conversation)),
    )


def _message_dict(message: Message, change: _TextChange) -> dict[str, Any]:
    role = message.role
    plain: dict[str, Any] = {"role": role, "content": change(role, message.content)}
    if message.reasoning:
        plain["reasoning_content"] = change(role, message.reasoning)
    if message.calls:
        functions = [{"name": call.name, "arguments": call.arguments} for call in message.calls]
        calls = [{"type": "function", "function": function} for function in functions]
        plain["tool_calls"] = _map_texts(calls, role, change)
    return plain


def _map_texts(value: Any, role: str, change: _TextChange) -> Any:
    if isinstance(value, str):
        return change(role, value)
    if isinstance(value, list):
        return [_map_texts(item, role, change) for item in value]
    if isinstance(value, dict):
        return {change(role, key): _map_texts(item, role, change) for key, item in value.items()}
    return value

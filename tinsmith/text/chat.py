"""Conversations as text and as ids, with the mask of what the assistant says.

What a message says is text, whatever it says: a name such as `<|im_end|>` in it is spelled out in
ordinary tokens. One exception: an assistant's own words may hold tags such as `<think>` or
`<answer>`, and there these are single ids, because who wrote the record wrote what the model is to
say. In every other role nothing is.

How it is done: inside messages, every character that could begin a special token's name is
followed by a guard, a character that occurs nowhere in the conversation. The template is rendered,
names without a guard become ids, and the guards are taken out of the rest. This holds for any
template, those of downloaded tokenizers included.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.text.records import BadRecord, Call, Conversation, Message, normalise
from tinsmith.text.specials import END_OF_TEXT, SPECIALS, TAGS, our_template
from tinsmith.text.template import ChatTemplate, compiled
from tinsmith.text.template_limits import Refused
from tinsmith.text.tokenizer import Tokenizer

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
    "words",
]

_OPENING = re.compile(r"<think>\n(?:\n</think>\n\n)?")
"""What a prompt may already hold of an answer: reasoning that is open, or closed at once."""
_NAMES = re.compile("|".join(map(re.escape, SPECIALS)))
_NONCHARACTERS = "".join(map(chr, range(0xFDD0, 0xFDF0)))
_Change = Callable[[str, str], str]


class Encoded(NamedTuple):
    """Ids, and for each whether the assistant says it (its end of turn included)."""

    ids: list[int]
    mask: list[bool]


def render(conversation: Conversation, generate: bool = False, thinking: bool | None = None) -> str:
    """A conversation in Tinsmith's ChatML.

    `generate` opens the assistant's next turn, `thinking` its `<think>` too.
    """
    return _script(None, conversation, lambda role, text: text).text(generate, thinking)


def words(conversation: Conversation) -> list[str]:
    """The text of a conversation in Tinsmith's ChatML, the template's own words included, between
    the names that are ids of their own: what a tokenizer learns from that is to encode it.
    """
    return [piece for piece in _NAMES.split(render(conversation)) if piece]


def encode_chat(tokenizer: Tokenizer, conversation: Conversation) -> Encoded:
    """A conversation with its loss mask, by the tokenizer's own template or else Tinsmith's.

    The mask covers reasoning, content, calls and the end-of-turn token of every assistant turn,
    not the header before and not the line end after it. UserError where a template does not show
    where turns begin and end; BadRecord where it refuses the conversation.
    """
    return _encoded(tokenizer, conversation, generate=False, thinking=None)


def encode_prompt(
    tokenizer: Tokenizer, conversation: Conversation, thinking: bool | None = None
) -> list[int]:
    """Ids up to the header of the answer: a prefix of `encode_chat` once the answer is there."""
    if conversation.messages and conversation.messages[-1].role == "assistant":
        raise UserError("a prompt ends with what a user or a tool says, not with the assistant")
    return _encoded(tokenizer, conversation, generate=True, thinking=thinking).ids


def _encoded(
    tokenizer: Tokenizer, conversation: Conversation, *, generate: bool, thinking: bool | None
) -> Encoded:
    """Encode stretch by stretch, cut where turns of the assistant begin and end."""
    guards = _Guards(tokenizer, conversation)
    script = _script(tokenizer, conversation, guards.protect)
    text = script.text(generate, thinking)
    ids: list[int] = []
    mask: list[bool] = []
    place = 0
    for start, opened, end in [*_turns(tokenizer, script, text, guards.mark), (len(text),) * 3]:
        for stop, said in ((start, False), (opened, True), (end, True)):
            new = guards.encode(text[place:stop])
            ids += new
            mask += [said] * len(new)
            place = stop
    return Encoded(ids, mask)


def _turns(
    tokenizer: Tokenizer, script: "_Script", text: str, mark: str
) -> Iterator[tuple[int, int, int]]:
    """Where the assistant's turns lie in a rendered text: start, end of what opens it, end.

    A turn starts where the prompt for it ends, and ends with the first end-of-turn token from
    there.
    """
    closing = tokenizer.decode([tokenizer.end_of_turn])
    for place, message in enumerate(script.messages):
        if message["role"] != "assistant":
            continue
        header = script.text(True, None, until=place)
        if not text.startswith(header):
            raise UserError("the chat template changes a prompt once it is answered: no loss mask")
        start = len(header)
        found = text.find(closing, start)
        if found < 0 or mark in text[start:found]:
            raise UserError(f"the chat template ends a turn without {closing}: no loss mask")
        opening = _OPENING.match(text, start)
        yield start, opening.end() if opening else start, found + len(closing)


class _Guards:
    """Two characters that a conversation does not have.

    The guard keeps names inside messages from being tokens; the mark stands where somebody else
    than the assistant begins to speak.
    """

    def __init__(self, tokenizer: Tokenizer, conversation: Conversation):
        self._tokenizer = tokenizer
        self._patterns = _patterns(tuple(tokenizer.added_tokens))
        said: list[str] = []
        _script(tokenizer, conversation, lambda role, text: said.append(text) or text)
        free = [c for c in _NONCHARACTERS if not any(c in text for text in said)]
        if len(free) < 2:
            raise BadRecord("uses nearly all of Unicode's noncharacters")
        self._guard, self.mark = free[:2]

    def protect(self, role: str, text: str) -> str:
        """Put a guard behind whatever could begin a name, but for an assistant's tags."""
        begins = self._patterns.begins_or_tag if role == "assistant" else self._patterns.begins
        guarded = begins.sub(self._guarded, text)
        return self.mark + guarded if role in ("user", "tool") else guarded

    def encode(self, text: str) -> list[int]:
        """Names without a guard as their ids, all else as text."""
        ids: list[int] = []
        for place, piece in enumerate(self._patterns.names.split(text)):
            if place % 2:
                ids.append(self._tokenizer.special(piece))
            elif piece:
                bare = piece.replace(self._guard, "").replace(self.mark, "")
                ids += self._tokenizer.encode_inside(bare)
        return ids

    def _guarded(self, match: re.Match[str]) -> str:
        return match[0] + self._guard if len(match[0]) == 1 else match[0]


class _Patterns(NamedTuple):
    """For a vocabulary's added tokens: a name, what begins one, and that or a whole tag."""

    names: re.Pattern[str]
    begins: re.Pattern[str]
    begins_or_tag: re.Pattern[str]


@lru_cache(maxsize=16)
def _patterns(names: tuple[str, ...]) -> _Patterns:
    """Names of a single character are left out, as a guard could not break them: they stay text."""
    real = sorted((name for name in names if len(name.strip()) > 1), key=len, reverse=True)
    begins = "[" + re.escape("".join(sorted({name[0] for name in real}))) + "]"
    tags = "|".join(map(re.escape, TAGS))
    return _Patterns(
        re.compile("(" + "|".join(map(re.escape, real)) + ")"),
        re.compile(begins),
        re.compile(f"{tags}|{begins}"),
    )


@dataclass(frozen=True)
class _Script:
    """A conversation as chat templates want it, and the template."""

    template: ChatTemplate
    messages: list[dict[str, Any]]
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
            variables["enable_thinking"] = thinking
        try:
            return self.template.render(variables, self.room)
        except Refused as error:
            raise BadRecord(f"the chat template refuses it: {error}") from None


def _script(tokenizer: Tokenizer | None, conversation: Conversation, change: _Change) -> _Script:
    """The conversation with every text in it changed; what describes tools has the role `tools`."""
    own = tokenizer.chat_template if tokenizer else None
    return _Script(
        template=compiled(our_template() if own is None else own),
        messages=[_plain(message, change) for message in conversation.messages],
        tools=[_changed(tool, "tools", change) for tool in conversation.tools],
        bos=(tokenizer.bos or "") if tokenizer else END_OF_TEXT,
        eos=tokenizer.eos if tokenizer else END_OF_TEXT,
        room=1_000_000 + 16 * len(repr(conversation)),
    )


def _plain(message: Message, change: _Change) -> dict[str, Any]:
    role = message.role
    plain: dict[str, Any] = {"role": role, "content": change(role, message.content)}
    if message.reasoning:
        plain["reasoning_content"] = change(role, message.reasoning)
    if message.calls:
        functions = [{"name": call.name, "arguments": call.arguments} for call in message.calls]
        calls = [{"type": "function", "function": function} for function in functions]
        plain["tool_calls"] = _changed(calls, role, change)
    return plain


def _changed(value: Any, role: str, change: _Change) -> Any:
    if isinstance(value, str):
        return change(role, value)
    if isinstance(value, list):
        return [_changed(item, role, change) for item in value]
    if isinstance(value, dict):
        return {change(role, key): _changed(item, role, change) for key, item in value.items()}
    return value

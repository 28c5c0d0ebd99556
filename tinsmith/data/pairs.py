"""Pairs of answers to one prompt, one of them preferred: read and encoded.

Both sides go through the same encoding with nothing random in it. What is learned from is the last
answer alone, its end of turn included: earlier turns of the assistant are part of the prompt.
"""

import re
from dataclasses import dataclass
from typing import Any

from tinsmith.text.chat import (
    BadRecord,
    Conversation,
    EncodedChat,
    encode_chat,
    encode_prompt,
    parse_conversation,
)
from tinsmith.text.tokenizer import Tokenizer

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """The same conversation up to its last turn, which the assistant says in two ways."""

    chosen: Conversation
    rejected: Conversation

    @property
    def prompt(self) -> Conversation:
        """What both sides answer."""
        return self.chosen.prompt()


def read_pair(record: Any) -> PreferencePair:
    """A record with `chosen` and `rejected`: each a text, a message, or a list of messages.

    What is answered comes from `prompt` or `question` (text, a transcript of `Human:` and
    `Assistant:` turns, or messages), from `conversations` or `messages`, from `instruction` and
    `input`, or from what both sides begin with where they are whole conversations or transcripts.
    BadRecord says what is wrong: a side missing or empty, other prompts, equal sides.
    """
    if not isinstance(record, dict):
        raise BadRecord("not a JSON object")
    chosen, rejected = (_side(record, name) for name in ("chosen", "rejected"))
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise BadRecord("`chosen` and `rejected` answer different prompts")
    if chosen.messages[-1] == rejected.messages[-1]:
        raise BadRecord("`chosen` and `rejected` are equal")
    return PreferencePair(chosen=chosen, rejected=rejected)


def prompt_messages(record: dict[str, Any]) -> list[Any]:
    """What a record asks, as role/content objects not yet judged; none where it asks nothing."""
    for key in ("prompt", "question"):
        output = record.get(key)
        if isinstance(output, list):
            return output
        if isinstance(output, str):
            return _transcript(output) or [{"role": "user", "content": output}]
    for key in ("messages", "conversations"):
        if isinstance(record.get(key), list):
            return record[key]
    if "instruction" in record:
        bare = {key: record[key] for key in ("instruction", "input", "history") if key in record}
        return _plain(parse_conversation(bare, answered=False))
    return []


def encode_pair(
    tokenizer: Tokenizer, pair: PreferencePair, seq_len: int
) -> tuple[EncodedChat, EncodedChat]:
    """Ids and mask of both sides, chosen first, each cut to `context` ids.

    BadRecord where the prompt is too long for a single token of an answer to be left, or nothing
    is left in which the sides differ.
    """
    prompt = len(encode_prompt(tokenizer, pair.prompt))
    if prompt >= seq_len:
        raise BadRecord(f"the prompt is {prompt} tokens; the context of {seq_len} has no room")
    chosen, rejected = (
        _answer_only(encode_chat(tokenizer, side), prompt, seq_len)
        for side in (pair.chosen, pair.rejected)
    )
    if chosen.ids == rejected.ids:
        raise BadRecord(f"the sides are equal as far as the context of {seq_len} reaches")
    return chosen, rejected


def _side(record: dict[str, Any], name: str) -> Conversation:
    """The whole conversation of one side."""
    output = record.get(name)
    if output is None:
        raise BadRecord(f"`{name}` is missing")
    requested = prompt_messages(record)
    if isinstance(output, str) and not requested and _transcript(output):
        messages = _transcript(output)
    elif isinstance(output, str):
        if not output.strip():
            raise BadRecord(f"`{name}` is empty")
        messages = [*requested, {"role": "assistant", "content": output}]
    else:
        turns = [output] if isinstance(output, dict) else output
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise BadRecord(f"`{name}` is neither text nor messages")
        messages = turns if len(turns) > 1 else [*requested, *turns]
    given = {key: record[key] for key in ("system", "tools") if key in record}
    whole = parse_conversation({"messages": messages} | given)
    if whole.messages[-1].role != "assistant" or len(whole.messages) < 2:
        raise BadRecord(f"`{name}` does not answer anything")
    return whole


def _transcript(text: str) -> list[dict[str, str]]:
    """Turns of a text that is written as `Human: ...`, `Assistant: ...`; none where it is not. An
    `Assistant:` at the end only says whose turn it is.
    """
    if not text.lstrip().startswith("Human:"):
        return []
    _, *parts = _TURN.split("\n\n" + text.lstrip())
    turns = [
        {"role": _SPEAKERS[speaker], "content": output.strip()}
        for speaker, output in zip(parts[::2], parts[1::2], strict=True)
    ]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def _plain(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in conversation.messages]


def _answer_only(encoded: EncodedChat, prompt: int, context: int) -> EncodedChat:
    """At most `context` ids, up to the last that is learned; the mask on the answer alone."""
    ids = encoded.ids[:context]
    mask = [output and place >= prompt for place, output in enumerate(encoded.mask[:context])]
    if not any(mask):
        raise BadRecord(f"nothing is left of an answer within the context of {context}")
    end = len(mask) - mask[::-1].index(True)
    return EncodedChat(ids[:end], mask[:end])

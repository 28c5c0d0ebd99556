"""Pairs: two answers to one prompt, of which one is preferred.

Both sides are encoded in the same way, without randomness. Only the last answer is trained, its
end-of-turn token included; earlier assistant turns belong to the prompt.
"""

import re
from dataclasses import dataclass
from typing import Any

from tinsmith.data.documents import Content, message_texts
from tinsmith.data.formats.base import (
    BuiltinSample,
    DataFormat,
    EncodedSequence,
    MaskedSamples,
)
from tinsmith.data.loader.pack import IndexedSamples
from tinsmith.data.prepare.shards import Shards
from tinsmith.text.chat import (
    BadRecord,
    Conversation,
    EncodedChat,
    encode_chat,
    encode_prompt,
    parse_conversation,
)
from tinsmith.text.fields import Fields, as_fields
from tinsmith.text.records import history_turns, question_text, read_messages, with_messages
from tinsmith.text.tokenizer import Tokenizer

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two conversations that differ in their last message, which the assistant writes."""

    chosen: Conversation
    rejected: Conversation

    @property
    def prompt(self) -> Conversation:
        """The prompt of both sides."""
        return self.chosen.prompt()

    def texts(self) -> list[str]:
        """Return the texts of the chosen side, and the rejected answer."""
        return message_texts([*self.chosen.messages, self.rejected.messages[-1]])

    def tokenizer_texts(self) -> list[str]:
        """Return the texts that a tokenizer is trained on."""
        return self.texts()


class Pairs(DataFormat):
    """Preference pairs of at most `seq_len` tokens; the last answer of each side is trained."""

    name = "pairs"
    needs_seq_len = True
    sequences_per_sample = 2
    evaluation = "objective"
    counts_tokens = False
    score_names = {
        "accuracy": "pairs ranked right",
        "margin": "margin",
        "loss": "loss per pair",
    }

    def read(self, record: Any) -> Content:
        """Read a record of a pair."""
        return read_pair(record)

    def record(self, sample: BuiltinSample) -> str | dict[str, Any]:
        """Return the sample's pair record."""
        return sample.pair()

    def encode(self, content: Content, tokenizer: Tokenizer, seq_len: int) -> list[EncodedSequence]:
        """Encode both sides, the chosen one first."""
        assert isinstance(content, PreferencePair)
        return [EncodedSequence(*side) for side in encode_pair(tokenizer, content, seq_len)]

    def open(self, shards: Shards, seq_len: int, *, verify: bool = False) -> IndexedSamples:
        """Open pairs of two rows each."""
        return MaskedSamples(shards, seq_len, self.sequences_per_sample)

    def split_key(self, content: Content) -> bytes:
        """Return the prompt, so that pairs of one prompt are on the same side of the split."""
        assert isinstance(content, PreferencePair)
        return repr(content.prompt).encode()


def read_pair(record: Any) -> PreferencePair:
    """Read a record with `chosen` and `rejected`: each a text, a message, or a list of messages.

    The prompt comes from `prompt` or `question` (text, a transcript of `Human:` and `Assistant:`
    turns, or messages), from `conversations` or `messages`, from `instruction` and `input`, or from
    the common beginning of both sides if they are whole conversations or transcripts. Raise
    BadRecord with the reason: a side missing or empty, different prompts, equal sides.
    """
    record = as_fields(record)
    chosen, rejected = (_side(record, name) for name in ("chosen", "rejected"))
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise BadRecord("`chosen` and `rejected` answer different prompts")
    if chosen.messages[-1] == rejected.messages[-1]:
        raise BadRecord("`chosen` and `rejected` are equal")
    return PreferencePair(chosen=chosen, rejected=rejected)


def prompt_messages(record: Fields) -> list[Any]:
    """Return the prompt of a record as role/content objects, not validated; empty without one."""
    for key in ("prompt", "question", "query"):
        if isinstance(record.peek(key), list):
            return record.get(key)
        if key in record:
            text = question_text(record, key)
            return _transcript(text) or [{"role": "user", "content": text}]
    for key in ("messages", "conversations"):
        if key in record:
            return read_messages(record, key) or []
    if "instruction" in record:
        question = {"role": "user", "content": question_text(record, "instruction")}
        return [*history_turns(record), question]
    return []


def encode_pair(
    tokenizer: Tokenizer, pair: PreferencePair, seq_len: int
) -> tuple[EncodedChat, EncodedChat]:
    """Encode both sides, chosen first, with the loss mask of the last answer. Each is cut to
    `seq_len` ids.

    Raise BadRecord if the prompt leaves no room for an answer, or if the sides are equal within
    `seq_len` tokens.
    """
    prompt = len(encode_prompt(tokenizer, pair.prompt))
    if prompt >= seq_len:
        raise BadRecord(f"the prompt has {prompt} tokens, and seq_len={seq_len} leaves no room")
    chosen, rejected = (
        _answer_only(encode_chat(tokenizer, side), prompt, seq_len)
        for side in (pair.chosen, pair.rejected)
    )
    if chosen.ids == rejected.ids:
        raise BadRecord(f"the sides are equal within seq_len={seq_len}")
    return chosen, rejected


def _side(record: Fields, name: str) -> Conversation:
    """Read the whole conversation of one side."""
    side = record.get(name)
    if side is None:
        raise BadRecord(f"`{name}` is missing")
    prompt = prompt_messages(record)
    if isinstance(side, str) and not prompt and _transcript(side):
        messages = _transcript(side)
    elif isinstance(side, str):
        if not side.strip():
            raise BadRecord(f"`{name}` is empty")
        messages = [*prompt, {"role": "assistant", "content": side}]
    else:
        turns = [side] if isinstance(side, dict) else side
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise BadRecord(f"`{name}` is neither text nor messages")
        messages = turns if len(turns) > 1 else [*prompt, *turns]
    whole = parse_conversation(with_messages(record, messages))
    if whole.messages[-1].role != "assistant" or len(whole.messages) < 2:
        raise BadRecord(f"`{name}` does not answer anything")
    return whole


def _transcript(text: str) -> list[dict[str, str]]:
    """Read a text of `Human: ...` and `Assistant: ...` turns. Return no turns for another text.

    An empty `Assistant:` at the end is dropped.
    """
    if not text.lstrip().startswith("Human:"):
        return []
    _, *parts = _TURN.split("\n\n" + text.lstrip())
    turns = [
        {"role": _SPEAKERS[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def _answer_only(encoded: EncodedChat, prompt_len: int, seq_len: int) -> EncodedChat:
    """Cut a side after its last trained id within `seq_len`, and mask all but the last answer."""
    ids = encoded.ids[:seq_len]
    mask = [learned and index >= prompt_len for index, learned in enumerate(encoded.mask[:seq_len])]
    if not any(mask):
        raise BadRecord(f"no token of the answer is within seq_len={seq_len}")
    end = len(mask) - mask[::-1].index(True)
    return EncodedChat(ids[:end], mask[:end])

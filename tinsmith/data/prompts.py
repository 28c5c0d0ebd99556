"""Prompts to be answered, with what an answer is checked by: read from records, encoded, kept.

Ids lie in shards as those of documents do. What else is known of a prompt lies beside them, in
shards whose tokens are the bytes of JSON texts, one for every prompt in the same order.
"""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from tinsmith.data.pairs import prompt_messages
from tinsmith.text.chat import BadRecord, Conversation, encode_prompt, parse_conversation
from tinsmith.text.records import answer_of
from tinsmith.text.tokenizer import Tokenizer

METADATA_DIR = "metadata"
"""The folder, inside that of a prepared part, of what is known of its prompts beside their ids."""
_ANSWERS = ("final", "answer", "output")
"""Fields of a record that hold what an answer is checked by: the bare result, if there is one."""


class Prompt(NamedTuple):
    """What an answer is generated for, and judged by."""

    ids: list[int]
    """Up to the header of the assistant's turn: an answer's ids follow at once."""
    prompt_id: int
    """Stable: the prompt's place among all those of its source, 0 <= number < source.size."""
    answer: str | None
    """The right answer, where the data has one."""
    record: dict[str, Any]
    """The whole row of the data, for rewards that want more: tests, the kind of task, tools."""


@dataclass(frozen=True, kw_only=True)
class PromptExample:
    """A prompt before it is encoded."""

    prompt: Conversation
    answer: str | None
    record: dict[str, Any]


def read_prompt(record: Any) -> PromptExample:
    """A record that asks something, and its answer.

    What is asked comes from `prompt` or `question` (text or messages), or is a chat without its
    last turn, where the assistant says that. The answer is the field `final`, `answer` or `output`
    (text or a number), or else what the assistant says last. BadRecord says what is wrong.
    """
    if not isinstance(record, dict):
        raise BadRecord("not a JSON object")
    messages = prompt_messages(record)
    if not messages:
        raise BadRecord("has none of `prompt`, `question`, `messages`, `instruction`")
    given = {key: record[key] for key in ("system", "tools") if key in record}
    whole = parse_conversation({"messages": messages} | given, answered=False)
    requested = whole.prompt()
    if not requested.messages:
        raise BadRecord("nobody asks anything")
    answer = answer_of(record, _ANSWERS)
    if answer is None and len(requested.messages) < len(whole.messages):
        answer = whole.messages[-1].content
    if answer is not None and not answer.strip():
        raise BadRecord("empty answer")
    return PromptExample(prompt=requested, answer=answer, record=record)


def encode_prompt_example(tokenizer: Tokenizer, example: PromptExample, seq_len: int) -> list[int]:
    """The prompt's ids; BadRecord where `context` has no room for a single token after them."""
    ids = encode_prompt(tokenizer, example.prompt)
    if len(ids) >= seq_len:
        raise BadRecord(f"the prompt is {len(ids)} tokens; the context of {seq_len} has no room")
    return ids


def encode_metadata(example: PromptExample) -> bytes:
    """What is kept of a prompt beside its ids."""
    kept = {"answer": example.answer, "record": example.record}
    return json.dumps(kept, ensure_ascii=False, default=str).encode()

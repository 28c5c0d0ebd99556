"""Prompts: completed by the model, with the data that rewards need.

Shards hold the ids. The metadata of every prompt (expected answer and whole record) is in shards
beside them, whose tokens are the bytes of JSON texts in the same order.
"""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinsmith.data.documents import Content, message_texts
from tinsmith.data.formats.base import (
    BuiltinSample,
    DataFormat,
    EncodedSequence,
    UnpackedSamples,
    sequence_span,
    single_row,
)
from tinsmith.data.formats.pairs import prompt_messages
from tinsmith.data.loader.pack import Row
from tinsmith.data.prepare.shards import Shards
from tinsmith.text.chat import (
    BadRecord,
    Conversation,
    encode_prompt,
    parse_conversation,
    template_texts,
)
from tinsmith.text.fields import Fields, as_fields
from tinsmith.text.records import answer_of, with_messages
from tinsmith.text.tokenizer import Tokenizer

METADATA_DIR = "metadata"
"""Folder of the metadata shards, inside the folder of a split."""
_ANSWERS = (
    *("final", "answer", "output", "gt", "ground_truth", "solution"),
    *("response", "completion", "label"),
)
"""Fields that may hold the expected answer: the bare result before the worked solution."""


class Prompt(NamedTuple):
    """A prompt to complete, with the data that rewards need."""

    ids: list[int]
    """Ids up to the header of the assistant's turn."""
    prompt_id: int
    """Index of the prompt in its dataset, 0 <= prompt_id < size. It never changes."""
    answer: str | None
    """The expected answer, if the data has one."""
    record: dict[str, Any]
    """The whole record of the data, for rewards that need more: unit tests, task name, tools."""


@dataclass(frozen=True, kw_only=True)
class PromptExample:
    """A prompt before it is encoded."""

    prompt: Conversation
    answer: str | None
    record: dict[str, Any]

    def texts(self) -> list[str]:
        """Return the texts of the prompt and the expected answer."""
        return [*message_texts(self.prompt.messages), *([self.answer] if self.answer else [])]

    def tokenizer_texts(self) -> list[str]:
        """Return the texts that a tokenizer is trained on."""
        return template_texts(self.prompt) if self.prompt.tools else self.texts()


class Prompts(DataFormat):
    """Prompts for reinforcement learning. Nothing is masked: completions are generated."""

    name = "prompts"
    masked = False
    needs_seq_len = True
    has_metadata = True
    evaluation = "generation"
    counts_tokens = False
    score_names = {
        "reward": "reward of greedy answers",
        "divergence": "divergence from the teacher at greedy answers",
        "truncated_fraction": "answers cut off",
    }

    def read(self, record: Any) -> Content:
        """Read a record of a prompt."""
        return read_prompt(record)

    def unread(self, record: Fields) -> tuple[str, ...]:
        """Return no field of the record itself: rewards get the whole record."""
        return tuple(name for name in super().unread(record) if "." in name)

    def record(self, sample: BuiltinSample) -> str | dict[str, Any]:
        """Return the sample's prompt record."""
        return sample.prompt()

    def encode(self, content: Content, tokenizer: Tokenizer, seq_len: int) -> list[EncodedSequence]:
        """Encode a prompt, with its answer and record as metadata; BadRecord if `seq_len` leaves no
        room for a completion.
        """
        assert isinstance(content, PromptExample)
        ids = encode_prompt(tokenizer, content.prompt)
        if len(ids) >= seq_len:
            raise BadRecord(
                f"the prompt has {len(ids)} tokens, and seq_len={seq_len} leaves no room"
            )
        metadata = {"answer": content.answer, "record": content.record}
        text = json.dumps(metadata, ensure_ascii=False, default=str)
        return [EncodedSequence(ids, None, text.encode())]

    def open(self, shards: Shards, seq_len: int, *, verify: bool = False) -> "PromptSamples":
        """Open prompts with their metadata."""
        metadata = Shards.open(shards.folder / METADATA_DIR, verify=verify)
        return PromptSamples(shards, metadata, seq_len)

    def split_key(self, content: Content) -> bytes:
        """Return the prompt, so that equal prompts are on the same side of the split."""
        assert isinstance(content, PromptExample)
        return repr(content.prompt).encode()

    def sample_prompt(
        self, ids: NDArray[np.int64], mask: NDArray[np.bool_], max_tokens: int
    ) -> list[int] | None:
        """Return the whole prompt."""
        return ids.tolist()


class PromptSamples(UnpackedSamples):
    """Prompts with their metadata."""

    def __init__(self, shards: Shards, metadata: Shards, seq_len: int):
        assert len(shards.document_starts) == len(metadata.document_starts), (
            "metadata is missing for some prompts"
        )
        super().__init__(shards, seq_len - 1)
        self._metadata = metadata

    def get_prompt(self, index: int, prompt_id: int) -> Prompt:
        """Return prompt `index`, which has the id `prompt_id` in the whole dataset."""
        raw = self._metadata.tokens(*sequence_span(self._metadata, index))
        metadata = json.loads(raw.astype(np.uint8).tobytes())
        ids = self._shards.tokens(*sequence_span(self._shards, index)).tolist()
        return Prompt(ids, prompt_id, metadata["answer"], metadata["record"])

    def get_rows(self, index: int) -> tuple[Row, ...]:
        """Return the ids of prompt `index` as a row without targets, not padded."""
        ids = self._shards.tokens(*sequence_span(self._shards, index))
        return (single_row(ids, np.zeros_like(ids), np.zeros(len(ids), dtype=bool)),)


def read_prompt(record: Any) -> PromptExample:
    """Read a record of a prompt and its expected answer.

    The prompt comes from `prompt` or `question` (text or messages), or is a chat without its last
    assistant message. An empty last assistant message stands for the completion (MiniMind). The
    answer is one of the fields `_ANSWERS` (text, a number, or a list of these), or else the last
    assistant message. Raise BadRecord with the reason.
    """
    record = as_fields(record)
    messages = _drop_empty_answer(prompt_messages(record))
    if not messages:
        raise BadRecord("has none of `prompt`, `question`, `messages`, `instruction`")
    whole = parse_conversation(with_messages(record, messages), answered=False)
    prompt = whole.prompt()
    if not prompt.messages:
        raise BadRecord("no message before the assistant's")
    answer = answer_of(record, _ANSWERS)
    if answer is None and len(prompt.messages) < len(whole.messages):
        answer = whole.messages[-1].content
    if answer is not None and not answer.strip():
        raise BadRecord("empty answer")
    return PromptExample(prompt=prompt, answer=answer, record=record)


def _drop_empty_answer(messages: list[Any]) -> list[Any]:
    """Return role/content objects without a last assistant message that has no content."""
    last = messages[-1] if messages and isinstance(messages[-1], dict) else {}
    content = last.get("content", last.get("value"))
    is_empty = content is None or (isinstance(content, str) and not content.strip())
    is_answer = last.get("role", last.get("from")) in ("assistant", "gpt")
    if is_answer and is_empty and not last.get("tool_calls") and not last.get("reasoning_content"):
        return messages[:-1]
    return messages

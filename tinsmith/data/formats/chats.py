"""Chats: conversations for fine-tuning, packed into rows of `seq_len` tokens."""

from typing import Any

from tinsmith.data.documents import Content
from tinsmith.data.formats.base import (
    BuiltinSample,
    DataFormat,
    EncodedSequence,
    encode_with_mask,
)
from tinsmith.data.loader.pack import ChatRows, IndexedSamples
from tinsmith.data.prepare.shards import Shards
from tinsmith.text.chat import BadRecord, parse_conversation
from tinsmith.text.tokenizer import Tokenizer


class Chats(DataFormat):
    """Conversations; the assistant's tokens are trained."""

    name = "chats"
    evaluation = "text"
    score_names = {"bpb": "bits per byte", "loss": "nats per token"}

    def read(self, record: Any) -> Content:
        """Read a chat record."""
        return parse_conversation(record)

    def record(self, sample: BuiltinSample) -> str | dict[str, Any]:
        """Return the sample's chat record."""
        return sample.chat()

    def encode(self, content: Content, tokenizer: Tokenizer, seq_len: int) -> list[EncodedSequence]:
        """Encode a conversation or a puzzle with its loss mask."""
        ids, mask = encode_with_mask(content, tokenizer)
        if not any(mask[1:]):
            raise BadRecord("no token of it is trained")
        return [EncodedSequence(ids, mask)]

    def open(self, shards: Shards, seq_len: int, *, verify: bool = False) -> IndexedSamples:
        """Open rows of one or several chats."""
        return ChatRows(shards, seq_len)

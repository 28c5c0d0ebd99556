"""Documents: texts for pretraining, packed into rows of `seq_len` tokens."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinsmith.data.documents import Content
from tinsmith.data.formats.base import (
    BuiltinSample,
    DataFormat,
    EncodedSequence,
    encode_with_mask,
)
from tinsmith.data.loader.pack import DocumentRows
from tinsmith.data.prepare.shards import Shards
from tinsmith.text.chat import Conversation, parse_conversation
from tinsmith.text.tokenizer import Tokenizer


class Documents(DataFormat):
    """Texts without a loss mask. A conversation becomes the text of the chat template."""

    name = "documents"
    masked = False
    is_chat = False
    evaluation = "text"
    score_names = {"bpb": "bits per byte", "loss": "nats per token"}

    def read(self, record: Any) -> Content:
        """Read a chat record, which becomes a text."""
        return parse_conversation(record)

    def record(self, sample: BuiltinSample) -> str | dict[str, Any]:
        """Return the sample's text."""
        return sample.text()

    def encode(self, content: Content, tokenizer: Tokenizer, seq_len: int) -> list[EncodedSequence]:
        """Encode a conversation or a puzzle, with the end-of-text token."""
        ids, _ = encode_with_mask(content, tokenizer)
        end = [tokenizer.end_of_text] if isinstance(content, Conversation) else []
        return [EncodedSequence([*ids, *end], None)]

    def open(self, shards: Shards, seq_len: int, *, verify: bool = False) -> DocumentRows:
        """Open windows of `seq_len` tokens."""
        return DocumentRows(shards, seq_len)

    def sample_prompt(
        self, ids: NDArray[np.int64], mask: NDArray[np.bool_], max_tokens: int
    ) -> list[int] | None:
        """Return the first `max_tokens` tokens of a document that is more than twice as long."""
        return ids[:max_tokens].tolist() if len(ids) > 2 * max_tokens else None

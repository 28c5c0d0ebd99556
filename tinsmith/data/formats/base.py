"""The base class of data formats: reading records, encoding them, opening them as samples."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tinsmith.data.arc.encoding import ArcExample, check_grid_tokenizer, encode_example
from tinsmith.data.documents import Content
from tinsmith.data.loader.pack import IndexedSamples, Row
from tinsmith.data.prepare.shards import Shards
from tinsmith.text.chat import Conversation, encode_chat
from tinsmith.text.fields import Fields
from tinsmith.text.tokenizer import Tokenizer


class EncodedSequence(NamedTuple):
    """Token ids of a document, a chat, a prompt, or one side of a pair."""

    ids: list[int]
    mask: list[bool] | None
    """True for ids that are trained, (n,); None in formats without a loss mask."""
    metadata: bytes | None = None
    """JSON about a prompt; None in other formats."""


class BuiltinSample(Protocol):
    """A sample of a built-in source, as a record of every format."""

    def text(self) -> str:
        """Return the sample as a text document."""
        ...

    def chat(self) -> dict[str, Any]:
        """Return the sample as a chat record."""
        ...

    def pair(self) -> dict[str, Any]:
        """Return the sample as a record of a preference pair."""
        ...

    def prompt(self) -> dict[str, Any]:
        """Return the sample as a prompt record."""
        ...


class DataFormat(ABC):
    """One way to make samples of data. The subclasses are the formats."""

    name: ClassVar[str]
    masked: ClassVar[bool] = True
    """True if shards store which tokens are trained."""
    needs_seq_len: ClassVar[bool] = False
    """True if samples are prepared for one sequence length."""
    sequences_per_sample: ClassVar[int] = 1
    has_metadata: ClassVar[bool] = False
    """True if the samples have metadata in shards of their own."""
    is_chat: ClassVar[bool] = True
    """True if samples are written with the chat template."""
    evaluation: ClassVar[Literal["text", "objective", "generation"]]
    """How a run measures validation samples: loss and bits per byte of the text; the metrics of the
    objective's loss; or completions of prompts.
    """
    counts_tokens: ClassVar[bool] = True
    """True if validation metrics are means over tokens, False if over samples."""
    score_names: ClassVar[Mapping[str, str]]
    """Description of the validation metrics that a model card lists."""

    @abstractmethod
    def read(self, record: Any) -> Content:
        """Read a record of a file. Raise BadRecord with the reason if it cannot be used."""

    def unread(self, record: Fields) -> tuple[str, ...]:
        """Return the names of the fields of a record that `read` did not use."""
        return tuple(dict.fromkeys(record.unread()))

    @abstractmethod
    def record(self, sample: BuiltinSample) -> str | dict[str, Any]:
        """Return the text or record of this format for a sample of a built-in source."""

    @abstractmethod
    def encode(self, content: Content, tokenizer: Tokenizer, seq_len: int) -> list[EncodedSequence]:
        """Encode a sample that is not plain text: one sequence, or both sides of a pair. Raise
        BadRecord with the reason if it cannot be used.
        """

    @abstractmethod
    def open(self, shards: Shards, seq_len: int, *, verify: bool = False) -> IndexedSamples:
        """Make samples of the shards of one split. `verify` checks hashes of further shards."""

    def split_key(self, content: Content) -> bytes:
        """Return the key that decides whether a record is for training or validation."""
        return repr(content).encode()

    def sample_prompt(
        self, ids: NDArray[np.int64], mask: NDArray[np.bool_], max_tokens: int
    ) -> list[int] | None:
        """Return the prompt of a validation sample, to be completed by the model during training:
        everything before the first trained token. None if the sample is too short.

        `ids` (n,) and the mask of their targets (n,) are those of one sequence; `max_tokens` limits
        prompts that are cut from text.
        """
        return ids[: int(mask.argmax()) + 1].tolist()


def encode_with_mask(content: Content, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Encode a conversation or an ARC puzzle: ids and loss mask."""
    if isinstance(content, ArcExample):
        check_grid_tokenizer(tokenizer)
        return encode_example(content)
    assert isinstance(content, Conversation)
    return encode_chat(tokenizer, content)


def sequence_span(shards: Shards, index: int) -> tuple[int, int]:
    """Return the first token and the end of one sequence in its shards."""
    start = int(shards.document_starts[index])
    return start, start + int(shards.document_lengths[index])


def masked_row(shards: Shards, index: int) -> Row:
    """Return one sequence as a row of its own, with targets where the mask is True."""
    span = sequence_span(shards, index)
    ids, mask = shards.tokens(*span), shards.mask(*span)
    next_ids, learned = np.append(ids[1:], 0), np.append(mask[1:], False)
    return single_row(ids, np.where(learned, next_ids, 0), learned)


def single_row(ids: NDArray[np.int64], targets: NDArray[np.int64], mask: NDArray[np.bool_]) -> Row:
    """Return a row of one sequence without padding."""
    return Row(ids, targets, mask, np.arange(len(ids)), np.zeros_like(ids))


class UnpackedSamples:
    """Base of samples that share their rows with no other sample and are not padded."""

    def __init__(self, shards: Shards, seq_len: int, sequences_per_sample: int = 1):
        longest = int(shards.document_lengths.max(initial=0))
        assert longest <= seq_len, f"samples were prepared for more than {seq_len} tokens"
        assert len(shards.document_starts) % sequences_per_sample == 0, "a sample is incomplete"
        self._shards = shards
        self.size = len(shards.document_starts) // sequences_per_sample
        self.num_tokens = shards.tokens_total
        self.num_split_chats = self.num_skipped_pieces = 0


class MaskedSamples(UnpackedSamples):
    """Samples with a loss mask: one row each, or two for a pair."""

    def __init__(self, shards: Shards, seq_len: int, sequences_per_sample: int = 1):
        assert shards.masked, "the shards have no loss mask"
        super().__init__(shards, seq_len, sequences_per_sample)
        self._sequences_per_sample = sequences_per_sample

    def get_rows(self, index: int) -> tuple[Row, ...]:
        """Return the rows of sample `index`, not padded."""
        first = index * self._sequences_per_sample
        return tuple(
            masked_row(self._shards, first + offset) for offset in range(self._sequences_per_sample)
        )

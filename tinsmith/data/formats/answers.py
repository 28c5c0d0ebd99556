"""Answers: chats that share their row with no other chat and are never cut."""

from tinsmith.data.documents import Content
from tinsmith.data.formats.base import EncodedSequence, MaskedSamples
from tinsmith.data.formats.chats import Chats
from tinsmith.data.loader.pack import IndexedSamples
from tinsmith.data.prepare.shards import Shards
from tinsmith.text.chat import BadRecord
from tinsmith.text.tokenizer import Tokenizer


class Answers(Chats):
    """Chats of at most `seq_len` tokens, one per row."""

    name = "answers"
    needs_seq_len = True
    evaluation = "objective"
    score_names = {
        "loss": "nats per learned token",
        "alignment_loss": "nats per token of answers after the model's own beginnings",
    }

    def encode(self, content: Content, tokenizer: Tokenizer, seq_len: int) -> list[EncodedSequence]:
        """Encode a chat; BadRecord if it is longer than `seq_len`."""
        (sequence,) = super().encode(content, tokenizer, seq_len)
        if len(sequence.ids) > seq_len:
            raise BadRecord(
                f"{len(sequence.ids)} tokens are more than seq_len={seq_len}, and a prompt is "
                "never cut"
            )
        return [sequence]

    def open(self, shards: Shards, seq_len: int, *, verify: bool = False) -> IndexedSamples:
        """Open rows of one chat each."""
        return MaskedSamples(shards, seq_len)

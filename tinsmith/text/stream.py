"""Decode token ids to text incrementally during generation (streaming)."""

import codecs

from tinsmith.text.tokenizer import Tokenizer


class TextStream:
    """Decodes ids to text deltas that never split a UTF-8 character.

    All deltas together equal `tokenizer.decode` of all ids. Bytes that are not UTF-8 become U+FFFD
    as soon as no later byte can complete the character.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True

    def push(self, token: int) -> str:
        """Add one id and return the text that is now complete, possibly empty."""
        raw = self._tokenizer.token_bytes(token, first=self._first)
        self._first = False
        return self._decoder.decode(raw)

    def finish(self) -> str:
        """Return the rest: U+FFFD for an incomplete character."""
        return self._decoder.decode(b"", final=True)

"""Ids to text, piece by piece, as it is generated."""

import codecs

from tinsmith.text.tokenizer import Tokenizer


class TextStream:
    """Turns ids into increments of text that never split a character.

    All increments together are `tokenizer.decode` of all ids: bytes that are not UTF-8 become
    U+FFFD, but only once it is clear that no character comes of them.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True

    def push(self, number: int) -> str:
        """The text that is certain with this id, possibly none."""
        raw = self._tokenizer.piece(number, first=self._first)
        self._first = False
        return self._decoder.decode(raw)

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that never became whole."""
        return self._decoder.decode(b"", final=True)

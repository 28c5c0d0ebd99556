"""Decode token ids to text incrementally (streaming), and detect stop strings."""

import codecs
from collections.abc import Sequence

from tinsmith.core.errors import UserError
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


class StopStrings:
    """Pass text through up to the first stop string, however the text is split into pieces.

    The first is the one that is complete first; if several end together, the longest. Text that
    could be the beginning of a stop string is buffered. UserError for an empty stop string.
    """

    def __init__(self, stops: Sequence[str]):
        if "" in stops:
            raise UserError("stop: an empty string would stop at once; leave it out")
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._buffer = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Return (text that can be shown, whether a stop string was found); later text is
        dropped.
        """
        if self._stopped:
            return "", True
        num_buffered, self._buffer = len(self._buffer), self._buffer + text
        for end in range(num_buffered + 1, len(self._buffer) + 1):
            for stop in self._stops:
                if self._buffer.endswith(stop, 0, end):
                    self._stopped = True
                    return self._release(end - len(stop)), True
        return self._release(self._safe_length()), False

    def finish(self) -> str:
        """Return the buffered text after the last piece."""
        return "" if self._stopped else self._release(len(self._buffer))

    def _safe_length(self) -> int:
        """Return the length of the buffered text in which no stop string can begin."""
        max_prefix = len(self._stops[0]) - 1 if self._stops else 0
        for start in range(max(len(self._buffer) - max_prefix, 0), len(self._buffer)):
            if any(stop.startswith(self._buffer[start:]) for stop in self._stops):
                return start
        return len(self._buffer)

    def _release(self, count: int) -> str:
        text, self._buffer = self._buffer[:count], self._buffer[count:]
        return text

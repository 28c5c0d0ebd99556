"""Decode token ids to text incrementally during generation (streaming).

Stop strings, wherever the borders of tokens fall.
"""

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
    """Passes text on up to the first stop string, whatever pieces it comes in.

    First is the one that is complete first (then the row can end); of several that end together,
    the longest. Text that could still turn out to be the beginning of one is held back. UserError
    for an empty stop string.
    """

    def __init__(self, stops: Sequence[str]):
        if "" in stops:
            raise UserError("stop: an empty string would stop everything; leave it out")
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string was found: later text is dropped)."""
        if self._stopped:
            return "", True
        known, self._held = len(self._held), self._held + text
        for end in range(known + 1, len(self._held) + 1):
            for stop in self._stops:
                if self._held.endswith(stop, 0, end):
                    self._stopped = True
                    return self._release(end - len(stop)), True
        return self._release(self._safe()), False

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        return "" if self._stopped else self._release(len(self._held))

    def _safe(self) -> int:
        """How much of the held text no stop string can begin in any more."""
        longest = len(self._stops[0]) - 1 if self._stops else 0
        for place in range(max(len(self._held) - longest, 0), len(self._held)):
            if any(stop.startswith(self._held[place:]) for stop in self._stops):
                return place
        return len(self._held)

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

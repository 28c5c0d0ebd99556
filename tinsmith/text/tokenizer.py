"""Text to token ids and back, losslessly, over Hugging Face's `tokenizer.json`.

Two tokenizers stand behind one `Tokenizer`: the whole one, which is what gets saved, and one without added tokens,
which does the encoding. So no text, whatever it says, ever becomes a special id: those come from `special` alone.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken

from tinsmith.core.errors import UserError
from tinsmith.core.files import atomic_write
from tinsmith.core.parse import nearest
from tinsmith.text.spelling import SPACE, spelling_of, text_only

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TAGS = (
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
"""Marks inside a turn: single ids that `skip_special_tokens` leaves in the text."""

CHAT_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN, *TAGS)
SPECIALS: tuple[str, ...] = (*CHAT_TOKENS, *(f"<|reserved_{number}|>" for number in range(5)))
"""The first ids of every tokenizer that is trained here, from 0 on."""

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
_BROKEN = re.compile("[\udc80-\udcff]")
_BROKEN_OR_MARK = re.compile(f"[\udc80-\udcff{SPACE}]")


class Tokenizer:
    """A vocabulary: `encode` and `bytes_of` are inverse on all bytes, `encode` and `decode` on all text.

    `settings` is the text of a `tokenizer.json`; `bos` and `eos` name the tokens that a `tokenizer_config.json` gives
    these roles; `chat_template` is a Jinja template of the tokenizer's own (None: Tinsmith's ChatML).
    `end_of_text` ends documents and `end_of_turn` what one role says: the `eos` of a foreign tokenizer keeps its part.
    """

    def __init__(
        self,
        settings: str,
        *,
        bos: str | None = END_OF_TEXT,
        eos: str = END_OF_TEXT,
        chat_template: str | None = None,
    ):
        parsed, self._whole = _open(settings)
        self.bos, self.eos, self.chat_template = bos, eos, chat_template
        _add_missing(self._whole, [name for name in (*CHAT_TOKENS, bos, eos) if name])
        self._spelling = spelling_of(parsed)
        self._text = tokenizers.Tokenizer.from_str(json.dumps(text_only(parsed, self._spelling)))
        self._added = {
            token.content: number
            for number, token in self._whole.get_added_tokens_decoder().items()
        }
        pieces = self._whole.get_vocab(with_added_tokens=False)
        ordinary = {piece: number for piece, number in pieces.items() if piece not in self._added}
        self._bytes = {number: self._spelling.piece(piece) for piece, number in ordinary.items()}
        self._bytes |= {number: name.encode() for name, number in self._added.items()}
        self._byte_ids = [ordinary.get(self._spelling.byte(value), -1) for value in range(256)]
        self._special_ids = frozenset(self._added.values())
        self._forbidden = frozenset(self._added[name] for name in self._added if name in pieces)
        self._every_byte = self._spelling.kind != "words" and min(self._byte_ids) >= 0
        self._exact = self._every_byte and self._survives(_PROBE)
        self.vocab_size = max(self._bytes) + 1
        self.end_of_text = self.special(END_OF_TEXT if eos == END_OF_TURN else eos)
        own_turns = chat_template is not None and END_OF_TURN not in chat_template
        self.end_of_turn = self.special(eos if own_turns else END_OF_TURN)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.to_json(), self.bos, self.eos, self.chat_template)

    @staticmethod
    def load(path_or_name: str | Path) -> "Tokenizer":
        """Open a `tokenizer.json`, a folder with one (or with `vocab.json` and `merges.txt`), or a Hub name.

        Chat tokens that it lacks are added behind its last id. UserError where there is no tokenizer.
        """
        from tinsmith.text.loading import find

        found = find(path_or_name)
        try:
            return Tokenizer(
                found.settings, bos=found.bos, eos=found.eos, chat_template=found.chat_template
            )
        except UserError as error:
            raise UserError(f"{found.place}: {error}") from None

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text. Never an added token's id; stretches of bytes that are not UTF-8 become byte tokens.

        UserError on a lone surrogate, and on text that a vocabulary without all bytes cannot write.
        """
        return self._encode(text, first=True)

    def encode_inside(self, text: str) -> list[int]:
        """Ids of a text that goes on after other ids: as `encode`, without the space some tokenizers put in front."""
        return self._encode(text, first=False)

    def encode_many(self, texts: Iterable[str | bytes]) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        given = list(texts)
        ready = {
            place: text
            for place, item in enumerate(given)
            if (text := self._as_text(item, first=True))
        }
        encodings = self._text.encode_batch_fast(list(ready.values()), add_special_tokens=False)
        done = {place: encoding.ids for place, encoding in zip(ready, encodings, strict=True)}
        return [
            self._checked(done[place], item, first=True) if place in done else self.encode(item)
            for place, item in enumerate(given)
        ]

    def special(self, name: str) -> int:
        """The id of an added token; UserError where there is none of that name."""
        if name not in self._added:
            raise UserError(
                f"the tokenizer has no special token '{name}'{nearest(name, list(self._added))}"
            )
        return self._added[name]

    @property
    def added_tokens(self) -> dict[str, int]:
        """Name -> id of every added token."""
        return dict(self._added)

    def piece(self, number: int, *, first: bool = False) -> bytes:
        """The bytes of one id, nothing for an unknown id; `first`: without the space put before a text."""
        raw = self._bytes.get(number, b"")
        strip = first and self._spelling.leading_space and number not in self._special_ids
        return raw.removeprefix(b" ") if strip else raw

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of ids; an added token gives its name, an unknown id nothing."""
        numbers = list(ids)
        return b"".join(
            [self.piece(number, first=True) for number in numbers[:1]] + self._raw(numbers[1:])
        )

    def _raw(self, ids: list[int]) -> list[bytes]:
        return [self._bytes.get(number, b"") for number in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens shown, U+FFFD where bytes are not UTF-8."""
        return self.bytes_of(ids).decode("utf-8", "replace")

    def byte_lengths(self) -> np.ndarray:
        """(V,) int64: how many bytes of text each id stands for; 0 for added and unknown ids."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for number, raw in self._bytes.items():
            lengths[number] = len(raw)
        lengths[list(self._special_ids)] = 0
        return lengths

    def to_json(self) -> str:
        """The text of `tokenizer.json`."""
        return self._whole.to_str(pretty=True)

    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that decides which ids a text or a chat becomes."""
        parts = [json.loads(self.to_json()), self.bos, self.eos, self.chat_template]
        return hashlib.sha256(
            json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, as `AutoTokenizer` reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        template = (
            TEMPLATE.read_text(encoding="utf-8")
            if self.chat_template is None
            else self.chat_template
        )
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos,
            "eos_token": self.eos,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 10**30,
        }
        atomic_write(folder / "tokenizer.json", self.to_json())
        atomic_write(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
        atomic_write(folder / "chat_template.jinja", template)

    def _encode(self, text: str | bytes, *, first: bool) -> list[int]:
        ready = self._as_text(text, first=first)
        ids = (
            self._text.encode(ready, add_special_tokens=False).ids
            if ready
            else self._piecewise(text, first=first)
        )
        return self._checked(ids, text, first=first)

    def _as_text(self, text: str | bytes, *, first: bool) -> str:
        """What the text-only tokenizer can take in one go, or nothing: then the text has to go piecewise."""
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError:
                return ""
        elif not text.isascii():
            _refuse_surrogates(text)
        if not text or (self._spelling.kind == "fallback" and SPACE in text):
            return ""
        return " " + text if first and self._spelling.leading_space else text

    def _piecewise(self, text: str | bytes, *, first: bool) -> list[int]:
        """Encode stretch by stretch: bytes that are not UTF-8, and a `▁` that means itself, as byte tokens."""
        raw = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
        raw = " " + raw if raw and first and self._spelling.leading_space else raw
        pattern = _BROKEN_OR_MARK if self._spelling.kind == "fallback" else _BROKEN
        ids: list[int] = []
        start = 0
        for match in pattern.finditer(raw):
            ids += self._text.encode(raw[start : match.start()], add_special_tokens=False).ids
            ids += [self._byte_ids[byte] for byte in match[0].encode("utf-8", "surrogateescape")]
            start = match.end()
        return ids + self._text.encode(raw[start:], add_special_tokens=False).ids

    def _checked(self, ids: list[int], text: str | bytes, *, first: bool) -> list[int]:
        if not self._forbidden.isdisjoint(ids) and self._every_byte:
            ids = [spelled for number in ids for spelled in self._respelled(number)]
        if not self._exact:
            raw = text.encode() if isinstance(text, str) else text
            written = self.bytes_of(ids) if first else b"".join(self._raw(ids))
            if written != raw or not self._forbidden.isdisjoint(ids):
                raise UserError(
                    f"the tokenizer's vocabulary cannot write {raw[:40]!r}; train one, or take another"
                )
        return ids

    def _respelled(self, number: int) -> list[int]:
        """An added token that text happened to reach, as byte tokens; any other id as it is."""
        if number not in self._forbidden:
            return [number]
        return [self._byte_ids[byte] for byte in self._bytes[number]]

    def _survives(self, text: str) -> bool:
        ids = self._text.encode(text, add_special_tokens=False).ids
        return b"".join(self._bytes[number] for number in ids) == text.encode()


_PROBE = " a  B\t\r\n\n don't 1234 e\u0301 \u00e9 \ufb01 \u4e2d\u6587\u3000 \U0001f469\u200d\U0001f4bb \x00\x7f\u2028<|x|>  "
"""Text that a tokenizer with any lossy step changes: accents both ways, a ligature, runs of blanks, control marks."""


def _rebuild(settings: str, bos: str | None, eos: str, chat_template: str | None) -> Tokenizer:
    return Tokenizer(settings, bos=bos, eos=eos, chat_template=chat_template)


def _open(settings: str) -> tuple[dict[str, Any], tokenizers.Tokenizer]:
    """Parse a `tokenizer.json`; padding and truncation, which belong to a use of it, are dropped."""
    try:
        parsed = json.loads(settings) | {"truncation": None, "padding": None}
        return parsed, tokenizers.Tokenizer.from_str(json.dumps(parsed))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"not a tokenizer.json: {str(error).splitlines()[0]}") from None


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"character {error.start} of a text is a lone surrogate, which is no character"
        ) from None


def _add_missing(whole: tokenizers.Tokenizer, names: list[str]) -> None:
    """Add the tokens that are not there yet, behind the last id; names that exist keep their ids."""
    known = {token.content for token in whole.get_added_tokens_decoder().values()}
    missing = [name for name in dict.fromkeys(names) if name not in known]
    whole.add_tokens(
        [AddedToken(name, special=name not in TAGS, normalized=False) for name in missing]
    )

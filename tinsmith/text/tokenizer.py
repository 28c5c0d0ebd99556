"""Lossless tokenizer over Hugging Face's `tokenizer.json`.

A `Tokenizer` holds two tokenizers: the complete one, which is saved, and one without added tokens,
which encodes. Therefore no text ever becomes a special token id. Only `special` returns those.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from tinsmith.core.errors import UserError
from tinsmith.core.files import atomic_write
from tinsmith.core.parse import did_you_mean
from tinsmith.text.byte_encoding import (
    SPACE,
    is_blank,
    prefix_tokens,
    read_byte_encoding,
    split_text,
    without_text_changes,
)
from tinsmith.text.loading import FolderSettings, find_tokenizer
from tinsmith.text.specials import (
    CHAT_TOKENS,
    END_OF_TEXT,
    END_OF_TURN,
    PAD,
    SPECIALS,
    START_OF_TURN,
    as_added,
    our_template,
)

__all__ = ["SPECIALS", "Tokenizer"]

MAX_PIECE_CHARS = 100_000
"""Characters to encode at once. Longer texts are slower, and 10 million spaces crash the splitter.
"""

_INVALID_BYTE = re.compile("[\udc80-\udcff]")
_INVALID_BYTE_OR_SPACE = re.compile(f"[\udc80-\udcff{SPACE}]")
_LOSSY_PROBE = (
    " a  B\t\r\n\n don't 1234 e\u0301 \u00e9 \ufb01 \u4e2d\u6587\u3000"
    " \U0001f469\u200d\U0001f4bb \x00\x7f\u2028<|x|>  "
)
"""Text that a lossy step changes: both forms of accents, a ligature, spaces, control characters."""

_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 10**30,
}
"""Keys of `tokenizer_config.json`, besides the roles of tokens."""


class Tokenizer:
    """A tokenizer. `bytes_of` inverts `encode` on all bytes, and `decode` inverts it on all text.

    `settings` is the text of a `tokenizer.json`; `bos`, `eos`, `pad` and `unk` name the tokens to
    which a `tokenizer_config.json` gives these roles; `chat_template` is a Jinja template, without
    which no conversation can be encoded. The id `end_of_text` ends documents, and `end_of_turn`
    ends a message. `folder_settings` are written back by `save`.
    """

    def __init__(
        self,
        settings: str,
        *,
        bos: str | None = END_OF_TEXT,
        eos: str = END_OF_TEXT,
        pad: str | None = None,
        unk: str | None = None,
        chat_template: str | None = None,
        folder_settings: FolderSettings | None = None,
    ):
        parsed, self._full = _open(settings)
        self.bos, self.eos, self.pad, self.unk = bos, eos, pad, unk
        self.chat_template = chat_template
        self.folder_settings = folder_settings or FolderSettings()
        _add_missing(self._full, [name for name in (bos, eos) if name])
        self._encoding = read_byte_encoding(parsed)
        self._text_tokenizer = tokenizers.Tokenizer.from_str(
            json.dumps(without_text_changes(parsed, self._encoding))
        )
        pieces = self._full.get_vocab(with_added_tokens=False)
        added = self._full.get_added_tokens_decoder()
        self._added = {
            token.content: token_id
            for token_id, token in added.items()
            if not (token.content in pieces and is_blank(token.content))
        }
        self.strips_left = frozenset(token.content for token in added.values() if token.lstrip)
        self.strips_right = frozenset(token.content for token in added.values() if token.rstrip)
        ordinary = {
            piece: token_id for piece, token_id in pieces.items() if piece not in self._added
        }
        self._bytes = {
            token_id: self._encoding.piece(piece) for piece, token_id in ordinary.items()
        }
        self._bytes |= {token_id: name.encode() for name, token_id in self._added.items()}
        self._byte_ids = [ordinary.get(self._encoding.byte(value), -1) for value in range(256)]
        self._special_ids = frozenset(self._added.values())
        self._spellable = frozenset(self._added[name] for name in self._added if name in pieces)
        self._every_byte = self._encoding.kind != "words" and min(self._byte_ids) >= 0
        self._exact = self._every_byte and self._is_lossless(_LOSSY_PROBE)
        self.vocab_size = max(self._bytes) + 1
        self.prefix = [self.special(name) for name in prefix_tokens(parsed)]
        """Ids before every text, such as BOS, by the post-processor of `tokenizer.json`."""
        ends_with_turn = eos == END_OF_TURN and END_OF_TEXT in self._added
        self.end_of_text = self.special(END_OF_TEXT if ends_with_turn else eos)
        is_chatml = chat_template is None or END_OF_TURN in chat_template
        has_turns = is_chatml and END_OF_TURN in self._added
        self.end_of_turn = self.special(END_OF_TURN if has_turns else eos)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.to_json(), self._options())

    @staticmethod
    def load(path_or_name: str | Path) -> "Tokenizer":
        """Open a `tokenizer.json`, a folder with one (or with GPT-2's two files), or a Hub name.

        Nothing is added to the vocabulary, except an end-of-text token if it has none. Raise
        UserError if there is no tokenizer.
        """
        files = find_tokenizer(path_or_name)
        try:
            return Tokenizer(
                files.settings,
                bos=files.roles.get("bos_token"),
                eos=files.roles.get("eos_token", END_OF_TEXT),
                pad=files.roles.get("pad_token"),
                unk=files.roles.get("unk_token"),
                chat_template=files.chat_template,
                folder_settings=files.folder_settings,
            )
        except UserError as error:
            raise UserError(f"{files.path}: {error}") from None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a completion: end of text, end of turn, and those of the model's config."""
        ids: list[Any] = [self.end_of_text, self.end_of_turn]
        for stored in (self.folder_settings.special_ids, self.folder_settings.generation):
            value = stored.get("eos_token_id")
            ids += value if isinstance(value, list) else [value]
        return tuple(sorted({token_id for token_id in ids if token_id in self._bytes}))

    def for_chats(self) -> "Tokenizer":
        """Return a tokenizer that can encode conversations, whose models end turns.

        Without a chat template it gets Tinsmith's, and if turns cannot be delimited, the tokens of
        that template are added after its last id. Completions of a model that is exported with the
        result stop at the end-of-turn token.
        """
        options = self._options()
        chat = self
        if self.chat_template is None:
            full = tokenizers.Tokenizer.from_str(self.to_json())
            if not {START_OF_TURN, END_OF_TURN} <= self._added.keys():
                _add_missing(full, list(CHAT_TOKENS))
            options["chat_template"] = our_template()
            chat = Tokenizer(full.to_str(pretty=True), **options)
        generation = self.folder_settings.generation
        if "eos_token_id" not in generation | self.folder_settings.special_ids:
            return chat
        options["folder_settings"] = self.folder_settings._replace(
            special_ids=self.folder_settings.special_ids | {"eos_token_id": list(chat.eos_ids)},
            generation=generation | {"eos_token_id": list(chat.eos_ids)},
        )
        return Tokenizer(chat.to_json(), **options)

    def encode(self, text: str | bytes) -> list[int]:
        """Encode a text to ids, never to added tokens. Bytes that are not UTF-8 become byte tokens.

        Raise UserError for a lone surrogate, and for text that a vocabulary without all bytes
        cannot represent.
        """
        return self._encode(text, first=True)

    def encode_inside(self, text: str | bytes) -> list[int]:
        """Encode a text that follows other ids: no space is added before it."""
        return self._encode(text, first=False)

    def encode_after_special(self, text: str) -> list[int]:
        """Encode a text that follows a special token, as the saved `tokenizer.json` does."""
        scheme = self._encoding.space_after_special
        if scheme == "always" or (scheme == "unless_space" and not text.startswith(" ")):
            text = " " + text
        return self.encode_inside(text)

    def encode_many(self, texts: Iterable[str | bytes]) -> list[list[int]]:
        """Encode many texts in parallel on all cores."""
        inputs = list(texts)
        prepared = [self._as_one_text(text, first=True) for text in inputs]
        encodings = iter(
            self._text_tokenizer.encode_batch_fast(
                [prepared_text for prepared_text in prepared if prepared_text],
                add_special_tokens=False,
            )
        )
        return [
            self._checked(next(encodings).ids, text, first=True)
            if prepared_text
            else self.encode(text)
            for text, prepared_text in zip(inputs, prepared, strict=True)
        ]

    def special(self, name: str) -> int:
        """Return the id of an added token. Raise UserError if there is none of that name."""
        if name not in self._added:
            known = did_you_mean(name, list(self._added))
            raise UserError(f"the tokenizer has no special token '{name}'{known}")
        return self._added[name]

    @property
    def added_tokens(self) -> dict[str, int]:
        """Return name -> id of every added token."""
        return dict(self._added)

    def token_bytes(self, number: int, *, first: bool = False) -> bytes:
        """Return the bytes of one id, empty for an unknown one.

        With `first`, the space that some tokenizers add before a text is removed.
        """
        raw = self._bytes.get(number, b"")
        return raw.removeprefix(b" ") if first and self._encoding.leading_space else raw

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """Return the exact bytes of ids. An added token gives its name, an unknown id nothing."""
        token_ids = list(ids)
        start = [self.token_bytes(token_id, first=True) for token_id in token_ids[:1]]
        return b"".join(start + self._raw(token_ids[1:]))

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text with special tokens shown, and U+FFFD for bytes that are not UTF-8."""
        return self.bytes_of(ids).decode("utf-8", "replace")

    def byte_lengths(self) -> np.ndarray:
        """Return (V,) int64: the number of text bytes of each id, 0 for added and unknown ids."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token_id, raw in self._bytes.items():
            lengths[token_id] = len(raw)
        lengths[list(self._special_ids)] = 0
        return lengths

    def to_json(self) -> str:
        """Return the text of `tokenizer.json`."""
        return self._full.to_str(pretty=True)

    def fingerprint(self) -> str:
        """Return the SHA-256 of everything that determines the ids of a text or chat."""
        return _hash([json.loads(self.to_json()), self.bos, self.eos, self.chat_template])

    def vocabulary_fingerprint(self) -> str:
        """Return the SHA-256 of what determines the ids of a text, and the ids of added tokens.

        Two tokenizers with equal vocabularies may differ in roles and chat template, as those of
        base and instruct models do.
        """
        settings = without_text_changes(json.loads(self.to_json()), self._encoding)
        parts = {key: settings.get(key) for key in ("model", "normalizer", "pre_tokenizer")}
        return _hash([parts, self._added])

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and, if it has one, the chat template.

        `AutoTokenizer` of transformers and `Tokenizer.load` open the folder.
        """
        roles = {"bos_token": self.bos, "eos_token": self.eos}
        if not self.folder_settings.tokenizer_config:  # a tokenizer of Tinsmith
            names = (name for name in (PAD, END_OF_TEXT, self.eos) if name in self._added)
            roles["pad_token"] = next(names)
        roles |= {"pad_token": self.pad} if self.pad else {}
        roles |= {"unk_token": self.unk} if self.unk else {}
        settings = _TOKENIZER_CONFIG | self.folder_settings.tokenizer_config | roles
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "tokenizer.json", self.to_json())
        atomic_write(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
        if self.chat_template is not None:
            atomic_write(folder / "chat_template.jinja", self.chat_template)
        if generation := self.folder_settings.special_ids | self.folder_settings.generation:
            atomic_write(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")

    def _options(self) -> dict[str, Any]:
        """Return the keyword arguments of the constructor."""
        names = ("bos", "eos", "pad", "unk", "chat_template", "folder_settings")
        return {name: getattr(self, name) for name in names}

    def _encode(self, text: str | bytes, *, first: bool) -> list[int]:
        prepared = self._as_one_text(text, first=first)
        ids = self._ids(prepared) if prepared else self._piecewise(text, first=first)
        return self._checked(ids, text, first=first)

    def _as_one_text(self, text: str | bytes, *, first: bool) -> str:
        """Return the text if it can be encoded at once, else an empty string: then encode
        piecewise.
        """
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError:
                return ""
        else:
            _refuse_surrogates(text)
        has_space_piece = self._encoding.kind == "fallback" and SPACE in text
        if not text or has_space_piece or len(text) > MAX_PIECE_CHARS:
            return ""
        return " " + text if first and self._encoding.leading_space else text

    def _piecewise(self, text: str | bytes, *, first: bool) -> list[int]:
        """Encode non-UTF-8 bytes and a literal `▁` as byte tokens, and the rest as text."""
        raw = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
        raw = " " + raw if raw and first and self._encoding.leading_space else raw
        pattern = _INVALID_BYTE_OR_SPACE if self._encoding.kind == "fallback" else _INVALID_BYTE
        ids: list[int] = []
        start = 0
        for match in pattern.finditer(raw):
            ids += self._ids(raw[start : match.start()])
            ids += [self._byte_ids[byte] for byte in match[0].encode("utf-8", "surrogateescape")]
            start = match.end()
        return ids + self._ids(raw[start:])

    def _ids(self, text: str) -> list[int]:
        if len(text) <= MAX_PIECE_CHARS:
            return self._text_tokenizer.encode(text, add_special_tokens=False).ids
        encodings = self._text_tokenizer.encode_batch_fast(
            split_text(text, MAX_PIECE_CHARS), add_special_tokens=False
        )
        return [token_id for encoding in encodings for token_id in encoding.ids]

    def _checked(self, ids: list[int], text: str | bytes, *, first: bool) -> list[int]:
        """Replace added tokens that the text reached by byte tokens, and check that nothing is
        lost.
        """
        if self._every_byte and not self._spellable.isdisjoint(ids):
            ids = [byte_id for token_id in ids for byte_id in self._as_byte_ids(token_id)]
        if not self._exact:
            raw = text.encode() if isinstance(text, str) else text
            decoded = self.bytes_of(ids) if first else b"".join(self._raw(ids))
            if decoded != raw or not self._spellable.isdisjoint(ids):
                raise UserError(f"the tokenizer's vocabulary cannot represent {raw[:40]!r}")
        return ids

    def _as_byte_ids(self, token_id: int) -> list[int]:
        if token_id not in self._spellable:
            return [token_id]
        return [self._byte_ids[byte] for byte in self._bytes[token_id]]

    def _is_lossless(self, text: str) -> bool:
        return b"".join(self._raw(self._ids(text))) == text.encode()

    def _raw(self, ids: list[int]) -> list[bytes]:
        return [self._bytes.get(token_id, b"") for token_id in ids]


def _rebuild(settings: str, options: dict[str, Any]) -> Tokenizer:
    return Tokenizer(settings, **options)


def _hash(parts: Any) -> str:
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _open(settings: str) -> tuple[dict[str, Any], tokenizers.Tokenizer]:
    """Parse a `tokenizer.json` without its padding and truncation settings."""
    try:
        parsed = json.loads(settings) | {"truncation": None, "padding": None}
        return parsed, tokenizers.Tokenizer.from_str(json.dumps(parsed))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"not a tokenizer.json: {str(error).splitlines()[0]}") from None


def _add_missing(tokenizer: tokenizers.Tokenizer, names: list[str]) -> None:
    """Add missing tokens after the last id. Existing tokens keep their ids."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens(as_added(name for name in dict.fromkeys(names) if name not in known))


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        position = error.start
        raise UserError(
            f"character {position} of a text is a lone surrogate, not a character"
        ) from None

"""Map pieces of a vocabulary to bytes: GPT-2's byte-to-unicode table, and byte fallback.

There are three encodings. *bytes*: every byte is one printable character (GPT-2's byte-level
alphabet). *fallback*: pieces are text with `▁` for a space, and `<0xE2>` for a byte that no piece
covers (SentencePiece with byte fallback). *words*: pieces are plain text, for a vocabulary of
symbols; other text is an error.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

SPACE = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class ByteEncoding:
    """How a vocabulary encodes bytes, and where the tokenizer adds a space."""

    kind: Literal["bytes", "fallback", "words"]
    leading_space: bool = False
    """Whether a space is added before a text."""
    space_after_special: Literal["never", "always", "unless_space"] = "never"
    """Whether a space is also added before text that follows a special token."""

    def piece(self, text: str) -> bytes:
        """Return the bytes of a piece of the vocabulary."""
        if self.kind == "bytes" and all(character in _BYTES for character in text):
            return bytes(_BYTES[character] for character in text)
        if self.kind == "fallback":
            byte = _BYTE_PIECE.fullmatch(text)
            return bytes([int(byte[1], 16)]) if byte else text.replace(SPACE, " ").encode()
        return text.encode()

    def byte(self, value: int) -> str:
        """Return the piece that encodes a single byte."""
        return _CHARACTERS[value] if self.kind == "bytes" else f"<0x{value:02X}>"


def is_blank(name: str) -> bool:
    """True for a token of whitespace only. It counts as text even if the vocabulary adds it."""
    return not name.strip(f" \t\r\n{SPACE}")


def read_byte_encoding(settings: dict[str, Any]) -> ByteEncoding:
    """Detect the byte encoding of a parsed `tokenizer.json`."""
    normalizers = _parts(settings.get("normalizer"))
    splitters = _parts(settings.get("pre_tokenizer"))
    if any(part["type"] == "ByteLevel" for part in normalizers + splitters):
        return ByteEncoding("bytes")
    kind = "fallback" if settings["model"].get("byte_fallback") else "words"
    if any(part["type"] == "Prepend" for part in normalizers):
        return ByteEncoding(kind, True, "always")
    schemes = [p.get("prepend_scheme", "always") for p in splitters if p["type"] == "Metaspace"]
    after_special = "unless_space" if "always" in schemes else "never"
    return ByteEncoding(kind, any(scheme != "never" for scheme in schemes), after_special)


def without_text_changes(settings: dict[str, Any], spelling: ByteEncoding) -> dict[str, Any]:
    """Return the tokenizer settings without added tokens and without steps that change a text.

    A normalizer such as NFC makes encoding lossy, so only normalizers that are part of the byte
    encoding stay. The caller adds the space before a text, because only the caller knows where a
    text begins.
    """
    model = settings["model"] | ({"dropout": None} if "dropout" in settings["model"] else {})
    stripped = settings | {"added_tokens": [], "post_processor": None, "model": model}
    if spelling.kind == "words":
        return stripped
    byte_step = "ByteLevel" if spelling.kind == "bytes" else "Replace"
    normalizers = [part for part in _parts(settings.get("normalizer")) if part["type"] == byte_step]
    splitters = [_without_prefix(part) for part in _parts(settings.get("pre_tokenizer"))]
    return stripped | {
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitters} if splitters else None,
    }


def prefix_tokens(settings: dict[str, Any]) -> list[str]:
    """Return the names of the special tokens that the post-processor puts before a text."""
    names: list[str] = []
    for part in _parts(settings.get("post_processor")):
        if part["type"] == "TemplateProcessing":
            for item in part["single"]:
                if "SpecialToken" not in item:
                    break
                names.append(item["SpecialToken"]["id"])
        elif part["type"] in ("RobertaProcessing", "BertProcessing"):
            names.append(part["cls"][0])
    return names


def split_text(text: str, max_chars: int) -> list[str]:
    """Split a text into parts of at most `max_chars` characters, if possible without changing ids.

    A split changes no ids after a single line end between two lines without whitespace at the
    split.
    """
    parts = []
    start = 0
    while len(text) - start > max_chars:
        position = end = start + max_chars
        while (position := text.rfind("\n", start + 1, position)) > 0:
            if not text[position - 1].isspace() and not text[position + 1].isspace():
                end = position + 1
                break
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def _without_prefix(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never", "add_prefix_space": False}
    return part | {"add_prefix_space": False} if part["type"] == "ByteLevel" else part


def _parts(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return a pipeline step as a flat list. A `Sequence` is expanded, None gives an empty list."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    steps = step.get("normalizers") or step.get("pretokenizers") or step.get("processors", [])
    return [part for inner_step in steps for part in _parts(inner_step)]


def _alphabet() -> dict[int, str]:
    """Build GPT-2's byte-to-unicode table: printable Latin-1 is itself, the rest is U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable}
    return alphabet | {byte: chr(256 + position) for position, byte in enumerate(others)}


_CHARACTERS = _alphabet()
_BYTES = {character: byte for byte, character in _CHARACTERS.items()}

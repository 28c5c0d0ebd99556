"""How a vocabulary writes bytes: what its pieces stand for, and a tokenizer that only sees text.

Three spellings exist. *bytes*: every byte is one printable character (GPT-2's byte-level
alphabet). *fallback*: pieces are text with `▁` for a space, and `<0xE2>` for a byte that no piece
covers (SentencePiece with byte fallback). *words*: pieces are just text, a vocabulary of symbols;
what they cannot write is refused.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

SPACE = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Spelling:
    """How pieces are written, and whether the tokenizer itself puts one space before a text."""

    kind: Literal["bytes", "fallback", "words"]
    leading_space: bool = False

    def piece(self, text: str) -> bytes:
        """The bytes that a piece of the vocabulary stands for."""
        if self.kind == "bytes" and all(character in _BYTES for character in text):
            return bytes(_BYTES[character] for character in text)
        if self.kind == "fallback":
            byte = _BYTE_PIECE.fullmatch(text)
            return bytes([int(byte[1], 16)]) if byte else text.replace(SPACE, " ").encode()
        return text.encode()

    def byte(self, value: int) -> str:
        """The piece of a single byte."""
        return _CHARACTERS[value] if self.kind == "bytes" else f"<0x{value:02X}>"


def is_blank(name: str) -> bool:
    """Whether a token is but a run of blanks, which is text even where a vocabulary adds it."""
    return not name.strip(f" \t\r\n{SPACE}")


def spelling_of(settings: dict[str, Any]) -> Spelling:
    """Find the spelling of a parsed `tokenizer.json`."""
    normalizers = _parts(settings.get("normalizer"))
    splitters = _parts(settings.get("pre_tokenizer"))
    if any(part["type"] == "ByteLevel" for part in normalizers + splitters):
        return Spelling("bytes")
    leading = any(part["type"] == "Prepend" for part in normalizers) or any(
        part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never"
        for part in splitters
    )
    return Spelling("fallback" if settings["model"].get("byte_fallback") else "words", leading)


def text_only(settings: dict[str, Any], spelling: Spelling) -> dict[str, Any]:
    """The same tokenizer without added tokens, and without steps that change a text.

    A normaliser such as NFC would make encoding lossy, so only those that *spell* are kept. A
    space put before a text is left to the caller, who alone knows where a text begins.
    """
    model = settings["model"] | ({"dropout": None} if "dropout" in settings["model"] else {})
    bare = settings | {"added_tokens": [], "post_processor": None, "model": model}
    if spelling.kind == "words":
        return bare
    spelled = "ByteLevel" if spelling.kind == "bytes" else "Replace"
    kept = [part for part in _parts(settings.get("normalizer")) if part["type"] == spelled]
    splitters = [_without_prefix(part) for part in _parts(settings.get("pre_tokenizer"))]
    return bare | {
        "normalizer": {"type": "Sequence", "normalizers": kept} if kept else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitters} if splitters else None,
    }


def cut(text: str, longest: int) -> list[str]:
    """Cut a text in parts of at most `longest` characters, where that changes no ids if possible.

    That is after a single line end between two lines that neither end nor begin with a blank.
    """
    parts = []
    start = 0
    while len(text) - start > longest:
        place = end = start + longest
        while (place := text.rfind("\n", start + 1, place)) > 0:
            if not text[place - 1].isspace() and not text[place + 1].isspace():
                end = place + 1
                break
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def _without_prefix(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never", "add_prefix_space": False}
    return part | {"add_prefix_space": False} if part["type"] == "ByteLevel" else part


def _parts(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A step of the pipeline as a flat list: sequences are opened, nothing gives an empty list."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    inner = step.get("normalizers", step.get("pretokenizers", []))
    return [part for one in inner for part in _parts(one)]


def _alphabet() -> dict[int, str]:
    """Byte -> character: printable Latin-1 is itself, the rest follows from U+0100 on (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable}
    return alphabet | {byte: chr(256 + place) for place, byte in enumerate(others)}


_CHARACTERS = _alphabet()
_BYTES = {character: byte for byte, character in _CHARACTERS.items()}
